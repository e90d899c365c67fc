"""A generator and a discriminator as one module: what it computes, what they share, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import AutoModelForMaskedLM, AutoModelForPreTraining

from tests.tiny_models import (
    BLOCKS,
    PREDICTIONS,
    SEQ_LEN,
    VOCABULARY_SIZE,
    assert_same_gradients,
    gradients,
    masked_batch,
    vocabulary,
)
from trainer.config import Config, GeneratorConfig
from trainer.config.file import parse_config
from trainer.data.batch import DRAWS, Batch
from trainer.data.blocks import IGNORED_LABEL
from trainer.errors import UserError
from trainer.model.classes import DETECTING, GENERATOR, MAIN
from trainer.model.replaced_tokens import ReplacingForward
from trainer.model.trained import build_trained, models_in, rehearse_trained
from trainer.objectives.objective import Tally, loss_sums, tally
from trainer.objectives.rtd import ReplacedLoss, labels_of
from trainer.sizing.flops import flops_per_token, head_flops, prediction_flops, step_flops

CPU = torch.device("cpu")
ELECTRA = {
    "hidden_size": 32,
    "embedding_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
DEBERTA = {name: value for name, value in ELECTRA.items() if name != "embedding_size"}
SIZES = {"electra-small": ELECTRA, "deberta-v3-base": DEBERTA, "bert-base": DEBERTA, "roberta-base": DEBERTA}


def config_of(
    preset: str = "electra-small",
    generator: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
    **sections: Any,
) -> Config:
    source = {"preset": preset, "overrides": SIZES.get(preset, {})} if model is None else model
    raw = {
        "run": {"dir": "unused"},
        "model": {"tokenizer": "unused", **source},
        "data": {"train": "unused", "seq_len": SEQ_LEN},
        "objective": {"name": "rtd", "generator": dict(generator or {})},
        "train": {"steps": 1, "precision": "fp32"},
    }
    return parse_config({**raw, **sections}, "test")


def built(size: int = VOCABULARY_SIZE, **settings: Any) -> Any:
    """Models whose predictions differ: fresh ones are near to uniform, and to none."""
    found: Any = build_trained(config_of(**settings), vocabulary(size), DETECTING)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in found.module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return found


def batch() -> Batch:
    input_ids, index, labels, _ = masked_batch()
    draws = torch.rand((BLOCKS, PREDICTIONS), generator=torch.Generator().manual_seed(3))
    labels, index = labels.clone(), index.clone()
    labels[PREDICTIONS - 1], index[PREDICTIONS - 1], draws[0, -1] = IGNORED_LABEL, 0, -1.0  # the first row has one less
    inputs = {"input_ids": input_ids, DRAWS: draws}
    return Batch(inputs, {"mlm": labels, "rtd": torch.zeros(BLOCKS * SEQ_LEN, dtype=torch.int64)}, index)


# What is computed


@pytest.mark.parametrize("share", ["embeddings", "disentangled", "nothing"])
def test_losses_and_gradients_are_those_of_the_stock_classes(share: str) -> None:
    found, made = built(generator={"share": share, "weight": 50.0}), batch()
    criterion = ReplacedLoss(GeneratorConfig(weight=50.0))
    network = ReplacingForward(found.module, CPU, document_attention=False)
    sums = loss_sums(criterion, network, made, 1)[:, 0]
    passed = network(made.inputs, made.prediction_index)
    labels = labels_of(made, passed.sampled)
    loss = sums[0] / made.count("mlm") + 50.0 * sums[1] / made.count("rtd")
    loss.backward()
    ours = gradients(found.module)

    found.module.zero_grad()
    placed = torch.full((BLOCKS * SEQ_LEN,), IGNORED_LABEL)
    known = made.labels["mlm"] != IGNORED_LABEL
    assert made.prediction_index is not None
    placed[made.prediction_index[known]] = made.labels["mlm"][known]
    generator, discriminator = found.exports[GENERATOR], found.exports[MAIN]
    stock = generator(input_ids=made.inputs["input_ids"], labels=placed.view(BLOCKS, SEQ_LEN)).loss
    shown = discriminator(input_ids=passed.tokens, labels=labels.view(BLOCKS, SEQ_LEN)).loss
    assert float(sums[0]) / made.count("mlm") == pytest.approx(float(stock), rel=1e-6)
    assert float(sums[1]) / made.count("rtd") == pytest.approx(float(shown), rel=1e-6)
    (stock + 50.0 * shown).backward()
    assert_same_gradients(ours, gradients(found.module))


def test_replaced_is_what_was_drawn_and_is_not_the_original() -> None:
    found, made = built(), batch()
    network = ReplacingForward(found.module, CPU, document_attention=False)
    index, originals = made.prediction_index, made.labels["mlm"]
    assert index is not None
    passed = network(made.inputs, index)
    known = originals != IGNORED_LABEL
    originals[0] = passed.sampled[0]  # one that the generator has told right
    expected = torch.zeros(BLOCKS * SEQ_LEN, dtype=torch.int64)
    for place, drawn, original in zip(index[known], passed.sampled[known], originals[known], strict=True):
        expected[place] = drawn != original
    assert torch.equal(labels_of(made, passed.sampled), expected)
    assert 0 < expected.sum() < known.sum()
    tokens = made.inputs["input_ids"].flatten().clone()
    tokens[index[known]] = passed.sampled[known]
    assert torch.equal(passed.tokens.flatten(), tokens), "what is not predicted stays"
    made.labels["rtd"][-3:] = IGNORED_LABEL
    assert (labels_of(made, passed.sampled)[-3:] == IGNORED_LABEL).all()


def test_an_evaluation_counts_what_is_found() -> None:
    found, made = built(), batch()
    made.labels["rtd"][-5:] = IGNORED_LABEL
    criterion = ReplacedLoss(GeneratorConfig())
    network = ReplacingForward(found.module.eval(), CPU, document_attention=False)
    with torch.no_grad():
        middle = network(made.inputs, made.prediction_index).detected.median()
        found.exports[MAIN].discriminator_predictions.dense_prediction.bias.sub_(middle)  # half are told to be replaced
        passed = network(made.inputs, made.prediction_index)
    of_mlm, of_rtd = (Tally(*row) for row in tally(criterion, network, made).tolist())
    labels = labels_of(made, passed.sampled)
    counted, told, is_one = labels != IGNORED_LABEL, passed.detected.flatten() > 0, labels == 1
    assert of_mlm.loss == pytest.approx(
        float(cross_entropy(passed.logits, made.labels["mlm"], reduction="sum")), rel=1e-6
    )
    losses = binary_cross_entropy_with_logits(
        passed.detected.flatten()[counted], labels[counted].float(), reduction="sum"
    )
    assert of_rtd.loss == pytest.approx(float(losses), rel=1e-6)
    assert of_rtd.right == int((told == is_one)[counted].sum()) and of_rtd.labels == BLOCKS * SEQ_LEN - 5
    both = int((told & is_one & counted).sum())
    assert both > 0
    values = criterion.metrics({"mlm": of_mlm, "rtd": of_rtd})
    assert values["eval/rtd/precision"] == pytest.approx(both / int((told & counted).sum()))
    assert values["eval/rtd/recall"] == pytest.approx(both / int(is_one.sum()))


# What is shared


def gradients_of_detection(share: str, preset: str = "electra-small") -> set[str]:
    """Names of the generator's weights to which the discriminator's loss has a gradient."""
    found, made = built(preset=preset, generator={"share": share}), batch()
    network = ReplacingForward(found.module, CPU, document_attention=False)
    network(made.inputs, made.prediction_index).detected.square().sum().backward()
    own = {name: parameter.grad for name, parameter in found.module.named_parameters()}
    assert any(grad is not None and bool(grad.any()) for name, grad in own.items() if name.startswith("discr"))
    return {name for name, grad in own.items() if name.startswith("generator.") and grad is not None and grad.any()}


def test_the_discriminators_loss_reaches_the_generator_by_shared_embeddings_alone() -> None:
    reached = gradients_of_detection("embeddings")
    assert reached and all(name.startswith("generator.electra.embeddings.") for name in reached)
    assert "generator.electra.embeddings.word_embeddings.weight" in reached
    assert gradients_of_detection("disentangled") == gradients_of_detection("nothing") == set()
    assert gradients_of_detection("disentangled", "deberta-v3-base") == set()


def test_disentangled_tables_begin_without_a_difference_and_are_read_as_a_sum() -> None:
    config = config_of(generator={"share": "disentangled"})
    found: Any = build_trained(config, vocabulary(), DETECTING)
    own, theirs = (found.exports[name].get_input_embeddings() for name in (MAIN, GENERATOR))
    assert not own.weight.any() and theirs.weight.any()
    ids = torch.arange(VOCABULARY_SIZE)
    with torch.no_grad():
        own.weight.add_(0.5)
        assert torch.equal(own(ids), theirs.weight + 0.5)


@pytest.mark.parametrize("preset", ["electra-small", "deberta-v3-base", "bert-base", "roberta-base"])
@pytest.mark.parametrize("share", ["embeddings", "disentangled", "nothing"])
def test_every_way_to_share_trains_every_class(preset: str, share: str) -> None:
    found, made = built(preset=preset, generator={"share": share}), batch()
    network = ReplacingForward(found.module, CPU, document_attention=False)
    loss_sums(ReplacedLoss(GeneratorConfig()), network, made, 1).sum().backward()
    assert all(parameter.grad is not None for parameter in found.module.parameters() if parameter.ndim >= 2)
    name = type(found.exports[MAIN]).__name__
    assert name.endswith("ForPreTraining" if preset == "electra-small" else "ForTokenClassification")
    if preset != "electra-small":
        assert found.exports[MAIN].config.id2label == {0: "replaced"}


def test_a_generator_is_small_unless_it_is_said_otherwise() -> None:
    electra = build_trained(config_of(), vocabulary(), DETECTING).exports[GENERATOR].config
    assert (electra.hidden_size, electra.num_attention_heads, electra.intermediate_size) == (8, 1, 12)
    assert (electra.embedding_size, electra.num_hidden_layers) == (16, 2)
    deberta = build_trained(config_of("deberta-v3-base"), vocabulary(), DETECTING).exports[GENERATOR].config
    assert (deberta.hidden_size, deberta.num_hidden_layers) == (32, 1)
    same = config_of(generator={"overrides": {"num_hidden_layers": 2}})
    assert build_trained(same, vocabulary(), DETECTING).exports[GENERATOR].config.hidden_size == 32


def test_flops_are_those_of_masked_tokens_and_of_all_tokens() -> None:
    models = models_in(build_trained(config_of(), vocabulary(), DETECTING).module)
    generator, discriminator = models[GENERATOR], models[MAIN]
    share = PREDICTIONS / SEQ_LEN
    expected = flops_per_token(generator, SEQ_LEN, share) + flops_per_token(discriminator, SEQ_LEN, 1.0)
    found = step_flops(models, SEQ_LEN, SEQ_LEN) + share * prediction_flops(models)
    assert found == pytest.approx(expected, rel=1e-12)
    layer, width, inner, heads = 2, 32, 48, SEQ_LEN  # L, H, I, A
    by_hand = layer * (8 * width**2 + 4 * width * inner) + 4 * layer * heads * width + 2 * width**2 + 2 * width
    projection = 2 * 16 * width  # embeddings of 16 are widened
    assert flops_per_token(discriminator, SEQ_LEN, 1.0) == 3 * (by_hand + projection)
    assert prediction_flops(models) == head_flops(generator)


# Checkpoints to go on from


def save(found: Any, folder: Path) -> tuple[str, str]:
    for name, model in found.exports.items():
        model.save_pretrained(folder / name)
    return str(folder), str(folder / GENERATOR)


def test_it_goes_on_from_two_checkpoints(tmp_path: Path) -> None:
    before = built()
    model, generator = save(before, tmp_path)
    config = config_of(model={"from_pretrained": model}, generator={"from_pretrained": generator})
    rehearse_trained(config, vocabulary(), [SEQ_LEN], DETECTING)
    after: Any = build_trained(config, vocabulary(), DETECTING)
    for name, value in before.module.state_dict().items():
        assert torch.equal(after.module.state_dict()[name], value), name
    assert not any("differ in the checkpoints" in note for note in after.notes)


def test_a_generator_that_begins_at_random_gets_the_models_embeddings(tmp_path: Path) -> None:
    model, _ = save(built(), tmp_path)
    table: Any = AutoModelForPreTraining.from_pretrained(model).get_input_embeddings().weight
    for share in ("embeddings", "disentangled"):
        found: Any = build_trained(
            config_of(model={"from_pretrained": model}, generator={"share": share}), vocabulary(), DETECTING
        )
        generator = found.exports[GENERATOR]
        assert torch.equal(generator.get_input_embeddings().weight, table)
        assert generator.generator_lm_head.weight is generator.get_input_embeddings().weight
        ids = torch.arange(VOCABULARY_SIZE)
        assert torch.equal(found.exports[MAIN].get_input_embeddings()(ids), table)


@pytest.mark.parametrize("share", ["embeddings", "disentangled", "nothing"])
def test_layers_of_a_trained_model_come_with_its_embeddings(share: str, tmp_path: Path) -> None:
    model, _ = save(built(), tmp_path)
    trained: Any = AutoModelForPreTraining.from_pretrained(model)
    depth = trained.config.num_hidden_layers
    source = {"preset": "electra-small", "overrides": SIZES["electra-small"]}
    layers = {"layers_from": {"model": model, "layers": list(range(depth))}}
    config = config_of(model={**source, **layers}, generator={"share": share})
    rehearse_trained(config, vocabulary(), [SEQ_LEN], DETECTING)
    found: Any = build_trained(config, vocabulary(), DETECTING).exports
    table, ids = trained.get_input_embeddings().weight, torch.arange(VOCABULARY_SIZE)
    assert torch.equal(found[MAIN].get_input_embeddings()(ids), table)
    assert torch.equal(found[GENERATOR].get_input_embeddings().weight, table) is (share != "nothing")
    positions = "electra.embeddings.position_embeddings.weight"
    assert torch.equal(found[MAIN].state_dict()[positions], trained.state_dict()[positions])


def test_tables_that_were_trained_apart_differ_by_what_they_differ(tmp_path: Path) -> None:
    model, generator = save(built(generator={"share": "nothing"}), tmp_path)
    tables: list[Any] = [
        kind.from_pretrained(path).get_input_embeddings().weight
        for kind, path in ((AutoModelForPreTraining, model), (AutoModelForMaskedLM, generator))
    ]
    sources: dict[str, Any] = {"model": {"from_pretrained": model}, "generator": {"from_pretrained": generator}}
    apart = config_of(model=sources["model"], generator={**sources["generator"], "share": "disentangled"})
    found: Any = build_trained(apart, vocabulary(), DETECTING).exports
    assert torch.equal(found[MAIN].get_input_embeddings().weight, tables[0] - tables[1])
    together: Any = build_trained(config_of(**sources), vocabulary(), DETECTING)
    assert torch.equal(together.exports[MAIN].get_input_embeddings().weight, tables[1])
    assert any("the generator's are shared" in note for note in together.notes)


@pytest.mark.parametrize("share", ["embeddings", "disentangled", "nothing"])
def test_both_vocabularies_grow(share: str, tmp_path: Path) -> None:
    model, generator = save(built(generator={"share": "nothing"}), tmp_path)
    config = config_of(model={"from_pretrained": model}, generator={"from_pretrained": generator, "share": share})
    larger = vocabulary(VOCABULARY_SIZE + 7)
    rehearse_trained(config, larger, [SEQ_LEN], DETECTING)
    found: Any = build_trained(config, larger, DETECTING)
    for each in found.exports.values():
        assert len(each.get_input_embeddings().weight) == each.config.vocab_size == VOCABULARY_SIZE + 7
    assert found.exports[GENERATOR].generator_lm_head.out_features == VOCABULARY_SIZE + 7


def test_the_rows_of_the_larger_checkpoint_are_those_of_both(tmp_path: Path) -> None:
    model, _ = save(built(size=VOCABULARY_SIZE + 24), tmp_path)
    found: Any = build_trained(config_of(model={"from_pretrained": model}), vocabulary(), DETECTING)
    assert {len(each.get_input_embeddings().weight) for each in found.exports.values()} == {VOCABULARY_SIZE + 24}


def test_another_matrix_than_the_decoder_is_not_resized(tmp_path: Path) -> None:
    deberta = {"preset": "deberta-v3-base", "overrides": {**DEBERTA, "legacy": False}}
    found: Any = build_trained(config_of(model=deberta), vocabulary(), DETECTING)
    _, generator = save(found, tmp_path)
    config = config_of(model={"from_pretrained": str(tmp_path)}, generator={"from_pretrained": generator})
    with pytest.raises(UserError) as error:
        rehearse_trained(config, vocabulary(VOCABULARY_SIZE + 7), [SEQ_LEN], DETECTING)
    assert "cannot be given the rows" in error.value.problem and "has 32 rows" in error.value.problem


# What is refused


@pytest.mark.parametrize(
    ("settings", "said", "where"),
    [
        (
            {"generator": {"overrides": {"embedding_size": 8}}},
            "The embeddings of the generator and of the model differ",
            "objective.generator.share",
        ),
        (
            {"preset": "bert-base", "generator": {"overrides": {"hidden_size": 16}}},
            "word_embeddings.weight is [200, 16] and [200, 32]",
            "objective.generator.share",
        ),
        (
            {"preset": "bert-base", "generator": {"share": "disentangled", "overrides": {"hidden_size": 16}}},
            "weight is [200, 16] and [200, 32]",
            "objective.generator.share",
        ),
        (
            {"generator": {"overrides": {"hiden_size": 16}}},
            "has no field 'hiden_size'. Did you mean 'hidden_size'?",
            "objective.generator.overrides.hiden_size",
        ),
        (
            {"generator": {"overrides": {"vocab_size": 16}}},
            "'vocab_size' cannot be overridden",
            "objective.generator.overrides.vocab_size",
        ),
        ({"preset": "gpt2"}, "is no encoder of which transformers has a class", "model.preset"),
    ],
)
def test_a_card_names_the_key(settings: Mapping[str, Any], said: str, where: str) -> None:
    config = config_of(**settings)
    with pytest.raises(UserError) as error:
        rehearse_trained(config, vocabulary(), [SEQ_LEN], DETECTING)
    assert said in error.value.problem and error.value.where == where
    with pytest.raises(UserError):
        build_trained(config, vocabulary(), DETECTING)


def test_a_generator_of_another_type_is_a_card(tmp_path: Path) -> None:
    _, generator = save(built(preset="bert-base"), tmp_path)
    with pytest.raises(UserError, match="The generator is of type 'bert', and the model of 'electra'"):
        rehearse_trained(config_of(generator={"from_pretrained": generator}), vocabulary(), [SEQ_LEN], DETECTING)
    missing = config_of(generator={"from_pretrained": str(tmp_path / "none")})
    with pytest.raises(UserError) as error:
        rehearse_trained(missing, vocabulary(), [SEQ_LEN], DETECTING)
    assert "objective.generator.from_pretrained" in error.value.where


def test_weights_are_the_same_on_every_rank_and_differ_between_the_two() -> None:
    config = config_of(generator={"share": "nothing", "overrides": {"num_hidden_layers": 2}})
    builds: list[Any] = [build_trained(config, vocabulary(), DETECTING) for _ in range(2)]
    first, second = builds
    for name, value in first.module.state_dict().items():
        assert torch.equal(second.module.state_dict()[name], value)
    one, other = (model.get_input_embeddings().weight for model in first.exports.values())
    assert not torch.equal(one, other)
