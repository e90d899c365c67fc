"""Causal classes as they are trained: the stock class's loss and gradients, nothing of the future, no whole logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import cross_entropy
from transformers import CONFIG_MAPPING

from tests.tiny_models import (
    CAUSAL_ARCHITECTURES,
    SEQ_LEN,
    VOCABULARY_SIZE,
    assert_same_gradients,
    gradients,
    lively_model,
    tiny_model,
    vocabulary,
    write_config,
)
from trainer.config import ModelConfig
from trainer.data.batch import Batch
from trainer.data.tokenizer import Vocabulary
from trainer.errors import UserError
from trainer.model import prediction_head
from trainer.model.build import build_model
from trainer.model.classes import CAUSAL
from trainer.model.forward import Forward
from trainer.model.hf_config import build_config
from trainer.objectives.clm import TERM
from trainer.objectives.cross_entropy import cross_entropies
from trainer.objectives.language_model import LanguageModelLoss
from trainer.objectives.objective import loss_sums, tally
from trainer.sizing.meta_trace import StepTracer, meta_model

CPU = torch.device("cpu")
BLOCKS = 3


def batch() -> Batch:
    tokens = torch.randint(4, VOCABULARY_SIZE, (BLOCKS, SEQ_LEN + 1), generator=torch.Generator().manual_seed(1))
    return Batch({"input_ids": tokens[:, :-1].contiguous()}, {TERM: tokens[:, 1:].reshape(-1)}, None)


@pytest.fixture(params=[1, 4], ids=["logits whole", "logits in pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    rows = BLOCKS * SEQ_LEN
    monkeypatch.setattr(prediction_head, "LOGITS_AT_ONCE", -(-rows * VOCABULARY_SIZE // request.param))
    return request.param


@pytest.mark.parametrize("model_type", [*CAUSAL_ARCHITECTURES, "gptj"])
def test_loss_and_gradients_are_the_stock_class_own(model_type: str, pieces: int, tmp_path: Path) -> None:
    model, made = lively_model(tmp_path, model_type), batch()
    logits = model(input_ids=made.inputs["input_ids"], use_cache=False).logits
    stock = cross_entropy(logits.flatten(0, 1), made.labels[TERM], reduction="sum")
    stock.backward()
    expected, _ = gradients(model), model.zero_grad()

    forward = Forward(model, CPU)
    rows: list[int] = []

    def kernel(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        rows.append(len(logits))
        return cross_entropies(logits, labels)

    loss = loss_sums(LanguageModelLoss(TERM, kernel), forward, made, 1).sum()
    loss.backward()
    in_pieces = pieces > 1 and model_type in CAUSAL_ARCHITECTURES
    assert rows == [BLOCKS * SEQ_LEN // pieces] * 2 * pieces if in_pieces else [BLOCKS * SEQ_LEN], "again, backward"
    assert abs(loss.item() - stock.item()) < 1e-6 * stock.item()
    assert_same_gradients(gradients(model), expected)


@pytest.mark.parametrize("model_type", CAUSAL_ARCHITECTURES)
def test_an_evaluation_counts_what_is_told_right(model_type: str, pieces: int, tmp_path: Path) -> None:
    model, made = lively_model(tmp_path, model_type).eval(), batch()
    with torch.no_grad():
        logits = model(input_ids=made.inputs["input_ids"]).logits.flatten(0, 1)
        made.labels[TERM][::3] = logits.argmax(dim=-1)[::3]
    expected = cross_entropy(logits, made.labels[TERM], reduction="sum")
    ((loss, right, count, *_),) = tally(LanguageModelLoss(TERM), Forward(model, CPU), made).tolist()
    assert loss == pytest.approx(float(expected), rel=1e-6)
    assert right == int((logits.argmax(dim=-1) == made.labels[TERM]).sum()) >= count / 3
    assert count == BLOCKS * SEQ_LEN


@pytest.mark.parametrize("model_type", CAUSAL_ARCHITECTURES)
def test_no_logit_depends_on_a_later_token(model_type: str, tmp_path: Path) -> None:
    """As gradients of each position's logits by the embeddings of all."""
    model = lively_model(tmp_path, model_type).eval()
    forward, ids = Forward(model, CPU), batch().inputs["input_ids"][:1]
    seen: list[torch.Tensor] = []
    table = model.get_input_embeddings()

    def keep(_module: Any, _args: Any, embedded: torch.Tensor) -> torch.Tensor:
        seen[:] = [embedded.detach().requires_grad_()]
        return seen[0]

    hook = table.register_forward_hook(keep)
    for position in (0, 5, SEQ_LEN - 2):
        logits = forward({"input_ids": ids}, torch.tensor([position])).logits
        logits.square().sum().backward()
        gradient = seen[0].grad
        assert gradient is not None
        reach = gradient[0].abs().amax(dim=-1) > 0
        assert reach[: position + 1].all() or model_type == "modernbert-decoder", "it sees what is before it"
        assert reach[position] and not reach[position + 1 :].any()
    hook.remove()


@pytest.mark.parametrize(
    ("model_type", "pieces"), [*((name, 4) for name in CAUSAL_ARCHITECTURES), ("llama", 1)], indirect=["pieces"]
)
def test_one_graph_serves_all_batches(model_type: str, pieces: int, tmp_path: Path) -> None:
    model, made = lively_model(tmp_path, model_type), batch()
    forward, criterion = Forward(model, CPU), LanguageModelLoss(TERM)
    eager = loss_sums(criterion, forward, made, 1)
    eager.sum().backward()
    expected, _ = gradients(model), model.zero_grad()
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    model.compile(backend=graphs, fullgraph=True, dynamic=False)
    for shift in (1, 0):
        other = Batch({"input_ids": made.inputs["input_ids"].roll(shift, 0)}, {TERM: made.labels[TERM].clone()}, None)
        model.zero_grad()
        compiled = loss_sums(criterion, forward, other, 1)
        compiled.sum().backward()
    assert graphs.frame_count == 1
    assert torch.allclose(compiled, eager, rtol=1e-5)
    assert_same_gradients(gradients(model), expected)


@pytest.mark.parametrize("model_type", ["mistral", "phi", "qwen2"])
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_classes_that_are_not_known_by_name_are_traced_too(model_type: str, device_type: Any, tmp_path: Path) -> None:
    config = build_config(write_config(tmp_path, model_type, num_key_value_heads=2), vocabulary(), SEQ_LEN, CAUSAL)
    tracer = StepTracer(meta_model(config, torch.float32), device_type, LanguageModelLoss(TERM))
    assert 0 < tracer.trace(batch()).activations < tracer.trace(batch()).adding


@pytest.mark.parametrize("model_type", ["gemma3n_text", "gemma4_text"])
def test_layers_of_different_sizes_are_a_card(model_type: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(CONFIG_MAPPING[model_type]().to_json_string(use_diff=False))
    settings = ModelConfig(config=str(tmp_path), tokenizer="unused")
    with pytest.raises(UserError, match="sizes that differ from layer to layer"):
        build_config(settings, vocabulary(), SEQ_LEN, CAUSAL)


def continued(folder: Path, vocabulary: Vocabulary, own: dict[str, Any] | None = None) -> Any:
    """A Llama that was saved, with fields of its `own`, made ready to go on with a tokenizer."""
    folder.mkdir(exist_ok=True)
    model = tiny_model(folder, "llama", tie_word_embeddings=False)
    model.config.update(own or {})
    model.save_pretrained(folder / "saved")
    settings = ModelConfig(from_pretrained=str(folder / "saved"), tokenizer="unused")
    return build_model(settings, vocabulary, SEQ_LEN, 0, CAUSAL)


@pytest.mark.parametrize(
    ("row", "pad_id", "shared", "learnt"),
    [(2, 2, True, True), (3, 3, True, True), (74, 1, False, True), (1, 1, False, False)],
    ids=[
        "it ends documents, too",
        "it stands for the unknown, too",
        "of the checkpoint alone",
        "it is padding alone",
    ],
)
def test_the_row_of_padding_is_learnt_where_text_may_hold_it(
    row: int, pad_id: int, shared: bool, learnt: bool, tmp_path: Path
) -> None:
    of_tokenizer = replace(vocabulary(), pad_id=pad_id, shared_pad=shared)
    built = continued(tmp_path, of_tokenizer, own={"pad_token_id": row})
    assert built.model.config.pad_token_id == row
    built.model(input_ids=torch.full((1, SEQ_LEN), row), use_cache=False).logits.sum().backward()
    assert (built.model.get_input_embeddings().weight.grad[row].abs().max() > 0) == learnt
    assert any(note.startswith("padding: ") for note in built.notes) == learnt


def test_a_checkpoint_takes_over_the_tokenizers_begin_and_end(tmp_path: Path) -> None:
    """Generation ends with the end token that the config names."""
    built = continued(tmp_path, replace(vocabulary(), begin_id=5, end_id=7, separator_id=7))
    assert (built.model.config.bos_token_id, built.model.config.eos_token_id) == (5, 7)
    assert sum("which the checkpoint had as" in note for note in built.notes) == 2
    same = continued(tmp_path / "same", vocabulary())
    assert not any("which the checkpoint had" in note for note in same.notes)
