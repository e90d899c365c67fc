"""Classes with a head for pairs as they are trained: the stock class's own loss and gradients, in one pass."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForPreTraining

from tests.tiny_models import (
    BLOCKS,
    PREDICTIONS,
    SEQ_LEN,
    masked_batch,
    preset,
    tiny_model,
    vocabulary,
    write_config,
)
from trainer.config import ModelConfig, ObjectiveConfig, PairConfig
from trainer.data.batch import Batch
from trainer.data.blocks import IGNORED_LABEL
from trainer.errors import UserError
from trainer.model.build import build_model
from trainer.model.classes import FAMILIES, PAIRED
from trainer.model.forward import Forward
from trainer.model.hf_config import build_config
from trainer.model.rehearsal import rehearse
from trainer.objectives.objective import loss_sums, loss_to_differentiate, tally
from trainer.objectives.pairs import PairedSamples, PairLoss
from trainer.sizing.flops import block_flops, flops_per_token, head_flops
from trainer.sizing.made_up import made_up_batch
from trainer.sizing.meta_trace import StepTracer, meta_model

CPU = torch.device("cpu")
TYPES = sorted(FAMILIES[PAIRED].classes)
ARGUMENT = {"albert": "sentence_order_label"}
LOGITS = {"albert": "sop_logits"}
WITHOUT_DROPOUT = {"albert": {"classifier_dropout_prob": 0.0}}
WEIGHT = 1.0
every_type = pytest.mark.parametrize("model_type", TYPES)


def paired_model(folder: Path, model_type: str) -> Any:
    return tiny_model(folder, model_type, family=PAIRED, **WITHOUT_DROPOUT.get(model_type, {}))


def pair_batch(labels: tuple[int, ...] = (1, 0, 1)) -> tuple[Batch, torch.Tensor]:
    """A batch, and its labels of tokens at their places."""
    input_ids, index, told, placed = masked_batch()
    types = torch.zeros_like(input_ids)
    for row in range(BLOCKS):
        types[row, 7 + 3 * row :] = 1
    inputs = {"input_ids": input_ids, "token_type_ids": types}
    return Batch(inputs, {"mlm": told, "nsp": torch.tensor(labels)}, index), placed


def criterion(weight: float = WEIGHT) -> PairLoss:
    return PairLoss(PairConfig(task="nsp", weight=weight))


def loss_of(forward: Forward, batch: Batch, weight: float = WEIGHT) -> torch.Tensor:
    loss = criterion(weight)
    counts = [batch.count(term.name) for term in loss.terms]
    return loss_to_differentiate(loss.terms, loss_sums(loss, forward, batch, 1), counts, averaged=1)


def gradients(model: Any) -> dict[str, torch.Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def test_the_classes_are_those_that_are_named() -> None:
    assert FAMILIES[PAIRED].classes == {
        "albert": "AlbertForPreTraining",
        "bert": "BertForPreTraining",
        "ernie": "ErnieForPreTraining",
        "megatron-bert": "MegatronBertForPreTraining",
    }


@every_type
def test_loss_and_gradients_are_the_stock_class_own(model_type: str, tmp_path: Path) -> None:
    model = paired_model(tmp_path, model_type)
    batch, placed = pair_batch()
    stock = model(
        **batch.inputs, labels=placed, **{ARGUMENT.get(model_type, "next_sentence_label"): batch.labels["nsp"]}
    )
    stock.loss.backward()
    expected = gradients(model)
    model.zero_grad()

    forward = Forward(model, CPU)
    loss = loss_of(forward, batch)
    loss.backward()
    assert abs(loss.item() - stock.loss.item()) < 1e-6
    found = gradients(model)
    largest = max(float(gradient.abs().max()) for gradient in expected.values() if gradient is not None)
    assert any("pooler" in name and gradient is not None for name, gradient in found.items())
    for name, gradient in expected.items():
        ours = found[name]
        assert (ours is None) == (gradient is None), name
        if ours is not None and gradient is not None:
            assert (ours - gradient).abs().max() < 1e-5 * max(1.0, largest), name


@every_type
def test_a_weight_weighs_the_pairs_alone(model_type: str, tmp_path: Path) -> None:
    model, (batch, _) = paired_model(tmp_path, model_type), pair_batch()
    forward = Forward(model, CPU)
    tokens, pairs = (float(each) for each in loss_sums(criterion(), forward, batch, 1)[:, 0].detach())
    expected = tokens / (BLOCKS * PREDICTIONS) + 0.25 * pairs / BLOCKS
    assert float(loss_of(forward, batch, 0.25).detach()) == pytest.approx(expected, rel=1e-6)


@every_type
def test_ignored_pairs_weigh_nothing_and_leave_gradients_of_nought(model_type: str, tmp_path: Path) -> None:
    model = paired_model(tmp_path, model_type)
    forward, (batch, _) = Forward(model, CPU), pair_batch((IGNORED_LABEL,) * BLOCKS)
    loss = loss_of(forward, batch)
    loss.backward()
    assert math.isfinite(loss.item())
    pooler = {name: p.grad for name, p in model.named_parameters() if "pooler" in name or "relationship" in name}
    assert pooler and all(grad is not None and not grad.any() for grad in pooler.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())

    some, _ = pair_batch((IGNORED_LABEL, 0, IGNORED_LABEL))
    assert some.count("nsp") == 1
    losses = criterion().predict(forward, some)["nsp"].losses
    assert (losses == 0).tolist() == [True, False, True]


@every_type
def test_an_evaluation_counts_pairs_told_right(model_type: str, tmp_path: Path) -> None:
    model = paired_model(tmp_path, model_type).eval()
    batch, _ = pair_batch()
    with torch.no_grad():
        logits = getattr(model(**batch.inputs), LOGITS.get(model_type, "seq_relationship_logits"))
    guesses = logits.argmax(dim=-1)
    batch.labels["nsp"] = torch.tensor([int(guesses[0]), 1 - int(guesses[1]), IGNORED_LABEL])
    (_, (loss, right, count, *_)) = tally(criterion(), Forward(model, CPU), batch).tolist()
    expected = torch.nn.functional.cross_entropy(logits, batch.labels["nsp"], reduction="sum")
    assert (right, count) == (1, 2) and loss == pytest.approx(float(expected), rel=1e-5)


@every_type
def test_one_graph_serves_all_batches(model_type: str, tmp_path: Path) -> None:
    model = paired_model(tmp_path, model_type)
    forward, (batch, _) = Forward(model, CPU), pair_batch()
    eager = loss_of(forward, batch)
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    model.compile(backend=graphs, fullgraph=True, dynamic=False)
    for labels in ((0, 1, IGNORED_LABEL), (1, 0, 1)):
        compiled = loss_of(forward, pair_batch(labels)[0])
        compiled.backward()
    assert graphs.frame_count == 1
    assert torch.allclose(compiled, eager, rtol=1e-5)


@every_type
def test_flops_count_pooler_and_head_once_a_block(model_type: str, tmp_path: Path) -> None:
    model, (batch, _) = paired_model(tmp_path, model_type), pair_batch()
    width = model.config.hidden_size
    assert block_flops(model) == 3 * (2 * width**2 + 4 * width)
    forward = Forward(model, CPU)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        forward(batch.inputs, batch.prediction_index)
    tokens = BLOCKS * SEQ_LEN * flops_per_token(model, SEQ_LEN, PREDICTIONS / SEQ_LEN)
    assert tokens + BLOCKS * block_flops(model) == pytest.approx(3 * counter.get_total_flops(), rel=1e-12)
    alone = tiny_model(tmp_path, model_type)
    assert block_flops(alone) == 0 and head_flops(alone) == head_flops(model)
    assert flops_per_token(alone, SEQ_LEN, 0.2) == flops_per_token(model, SEQ_LEN, 0.2)


@every_type
@pytest.mark.parametrize(("device_type", "dtype"), [("cpu", torch.float32), ("cuda", torch.bfloat16)])
def test_a_step_is_traced_with_both_terms(model_type: str, device_type: Any, dtype: Any, tmp_path: Path) -> None:
    pair = PairConfig(task="nsp")
    samples = PairedSamples(ObjectiveConfig(pair=pair), pair, vocabulary(), SEQ_LEN)
    config = build_config(write_config(tmp_path, model_type), vocabulary(), SEQ_LEN, PAIRED)
    model = meta_model(config, dtype)
    traced = StepTracer(model, device_type, criterion()).trace(made_up_batch(samples, 4))
    counted = 4 * SEQ_LEN * flops_per_token(model, SEQ_LEN, samples.head_rows / SEQ_LEN) + 4 * block_flops(model)
    assert counted <= traced.flops <= 1.2 * counted
    assert 0 < traced.activations <= traced.with_gradients


def test_a_masked_model_becomes_one_of_pairs_whose_head_starts_at_random(tmp_path: Path) -> None:
    tiny_model(tmp_path, "bert").save_pretrained(tmp_path / "masked")
    settings = ModelConfig(from_pretrained=str(tmp_path / "masked"), tokenizer="unused")
    rehearse(settings, vocabulary(), [SEQ_LEN], PAIRED)
    built = build_model(settings, vocabulary(), SEQ_LEN, 0, PAIRED)
    assert type(built.model).__name__ == "BertForPreTraining"
    (note,) = [note for note in built.notes if "initialised at random" in note]
    assert "bert.pooler.dense.weight" in note and "cls.seq_relationship.weight" in note


def test_albert_base_has_the_published_sizes() -> None:
    config = build_config(preset("albert-base"), vocabulary(30_000), 512, PAIRED)
    with torch.device("meta"):
        model = AutoModelForPreTraining.from_config(config)
    # "12M" in table 1 of the paper, which counts no heads.
    encoder = sum(parameter.numel() for parameter in model.albert.parameters())
    assert encoder == 11_683_584
    assert config.hidden_dropout_prob == config.attention_probs_dropout_prob == 0.0
    assert config.architectures == ["AlbertForPreTraining"]


@pytest.mark.parametrize(
    ("model_type", "changes", "said"),
    [
        ("roberta", {}, "is no encoder with a head for pairs of sentences"),
        ("bert", {"type_vocab_size": 1}, "With objective.pair type_vocab_size must be 2, got 1"),
        ("albert", {"num_labels": 3}, "With objective.pair num_labels must be 2, got 3"),
    ],
)
def test_what_cannot_tell_pairs_is_a_card(model_type: str, changes: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        build_config(write_config(tmp_path, model_type, **changes), vocabulary(), SEQ_LEN, PAIRED)
    assert said in error.value.problem
    if model_type == "roberta":
        assert "bert, ernie, megatron-bert or albert, or train this one with objective.pair=null." in error.value.remedy
