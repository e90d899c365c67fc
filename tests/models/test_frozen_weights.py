"""Which weights the patterns of `model.frozen` name, and what cannot be frozen: known before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.tiny_models import SEQ_LEN, family_of_type, tiny_model, vocabulary, write_config
from trainer.config import Config, ModelConfig, ObjectiveConfig
from trainer.config.file import parse_config
from trainer.engine.deepspeed_config import check_precision
from trainer.errors import UserError
from trainer.model.build import build_model
from trainer.model.frozen import freeze
from trainer.model.rehearsal import rehearse
from trainer.sizing.memory_estimate import MemoryEstimate
from trainer.sizing.micro_batch import is_of_layout, memory_layout

LAYERS = {
    "bert": "bert.encoder.*",
    "roberta": "roberta.encoder.*",
    "modernbert": "model.layers.*",
    "gpt2": "transformer.h.*",
    "albert": "albert.encoder.*",
    "xlnet": "transformer.layer.*",
}


def settings_of(folder: Path, model_type: str, *frozen: str, **changes: Any) -> ModelConfig:
    return write_config(folder, model_type, **changes).model_copy(update={"frozen": list(frozen)})


def build(folder: Path, model_type: str, *frozen: str, size: int = 500) -> Any:
    settings = settings_of(folder, model_type, *frozen)
    return build_model(settings, vocabulary(size), SEQ_LEN, 0, family_of_type(model_type))


@pytest.mark.parametrize("model_type", LAYERS)
def test_the_layers_of_a_class_are_frozen_by_one_pattern(model_type: str, tmp_path: Path) -> None:
    built = build(tmp_path, model_type, LAYERS[model_type])
    trained = {name for name, weight in built.model.named_parameters() if weight.requires_grad}
    prefix = LAYERS[model_type].removesuffix("*")
    assert built.frozen and all(name.startswith(prefix) for name in built.frozen)
    assert not any(name.startswith(prefix) for name in trained)
    assert len(trained) + len(built.frozen) == len(list(built.model.parameters()))
    sizes = {name: weight.numel() for name, weight in built.model.named_parameters()}
    count, total = sum(sizes[name] for name in built.frozen), sum(sizes.values())
    line = f"frozen: {count:,} of {total:,} parameters ({count / total:.1%})"
    assert [note for note in built.notes if note.startswith(line)]
    rehearse(settings_of(tmp_path, model_type, LAYERS[model_type]), vocabulary(), [SEQ_LEN], family_of_type(model_type))


def test_a_pattern_for_one_name_of_a_tied_weight_freezes_it_and_that_is_said(tmp_path: Path) -> None:
    built = build(tmp_path, "bert", "cls.predictions.decoder.*")
    assert built.frozen == ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias")
    (line,) = [note for note in built.notes if " is " in note and note.startswith("frozen: ")]
    assert "cls.predictions.decoder.weight is bert.embeddings.word_embeddings.weight as well" in line
    assert not built.model.cls.predictions.decoder.weight.requires_grad


def test_what_a_class_does_not_train_itself_is_none_of_it(tmp_path: Path) -> None:
    built = build(tmp_path, "roformer", "roformer.encoder.*")
    assert not built.model.roformer.encoder.embed_positions.weight.requires_grad
    assert "roformer.encoder.embed_positions.weight" not in built.frozen


CARDS = {
    "another class": (["roberta.encoder.*"], "No weight of BertForMaskedLM has a name like", "'bert.encoder.*'"),
    "a slip": (
        ["bert.encoder.layer.0.atention.*"],
        "No weight of BertForMaskedLM",
        "'bert.encoder.layer.0.attention.*'",
    ),
    "a layer too many": (["bert.encoder.layer.7.*"], "has a name like 'bert.encoder.layer.7.*'", "bert.encoder.layer."),
    "everything": (["bert.*", "cls.*"], "All weights of BertForMaskedLM are frozen", '["bert.encoder.layer.*"]'),
    "everything at once": (["*"], "nothing is left to train", "Leave some out"),
}


@pytest.mark.parametrize("name", CARDS)
def test_a_pattern_that_names_nothing_or_everything_is_refused(name: str, tmp_path: Path) -> None:
    frozen, problem, remedy = CARDS[name]
    settings = settings_of(tmp_path, "bert", *frozen)
    config = config_of(settings)
    for start in (
        lambda: build_model(settings, vocabulary(), SEQ_LEN, 0),
        lambda: rehearse(settings, vocabulary(), [SEQ_LEN]),
        lambda: MemoryEstimate(config, vocabulary(), {"zero_optimization": {"stage": 1}}, "cpu"),
    ):
        with pytest.raises(UserError) as caught:
            start()
        assert problem in caught.value.problem and remedy in caught.value.remedy
        assert caught.value.where.startswith("model.frozen=")


def test_weights_that_lead_to_no_logit_are_nothing_to_train(tmp_path: Path) -> None:
    """ESM's head for contacts is part of the class, and takes no part in its logits."""
    names = [name for name, _ in tiny_model(tmp_path, "esm").named_parameters()]
    others = [name for name in names if "contact_head" not in name]
    assert len(others) < len(names)
    with pytest.raises(UserError, match="No logit of EsmForMaskedLM depends on a weight that is not frozen"):
        rehearse(settings_of(tmp_path, "esm", *others), vocabulary(), [SEQ_LEN])


def test_rows_of_new_tokens_that_stay_at_the_mean_are_said(tmp_path: Path) -> None:
    tiny_model(tmp_path, "bert").save_pretrained(tmp_path / "old")
    for frozen, expected in ((["bert.embeddings.*"], True), (["bert.encoder.*"], False)):
        settings = ModelConfig(from_pretrained=str(tmp_path / "old"), frozen=frozen)
        built = build_model(settings, vocabulary(530), SEQ_LEN, 0)
        said = any("so that the rows of new tokens stay near the mean" in note for note in built.notes)
        assert said is expected
        rehearse(settings, vocabulary(530), [SEQ_LEN])


def config_of(settings: ModelConfig, **zero: Any) -> Config:
    raw = {
        "run": {"dir": "unused"},
        "model": settings.model_dump(),
        "data": {"train": "unused", "seq_len": SEQ_LEN},
        "train": {"steps": 1, "precision": "fp32"},
        "batch": {"micro_size": "auto"},
    }
    return parse_config(raw, "test")


def test_nothing_keeps_frozen_weights_in_8_bits(tmp_path: Path) -> None:
    preset = {"zero_optimization": {"stage": 3, "zero_quantized_nontrainable_weights": True}}
    check_precision(config_of(settings_of(tmp_path, "bert")), preset)
    with pytest.raises(UserError, match="keeps frozen weights in 8 bits"):
        check_precision(config_of(settings_of(tmp_path, "bert", "bert.encoder.*")), preset)


def test_a_micro_batch_found_before_there_were_frozen_weights_holds_without_them(tmp_path: Path) -> None:
    plain, frozen = (config_of(settings_of(tmp_path, "bert", *given)) for given in ([], ["bert.encoder.*"]))
    assert "frozen" not in memory_layout(plain, 1, "cpu")["model"]
    assert memory_layout(frozen, 1, "cpu")["model"]["frozen"] == ["bert.encoder.*"]


def test_a_micro_batch_that_was_found_is_of_the_objective_and_its_generator(tmp_path: Path) -> None:
    plain = config_of(settings_of(tmp_path, "bert"))
    sections = [
        {"name": "mlm"},
        {"name": "clm"},
        {"name": "mlm", "teacher": {"model": "one"}},
        {"name": "rtd", "generator": {"overrides": {"num_hidden_layers": 1}}},
        {"name": "rtd", "generator": {"overrides": {"num_hidden_layers": 9}}},
    ]
    layouts = [
        memory_layout(plain.model_copy(update={"objective": ObjectiveConfig.model_validate(section)}), 1, "cpu")
        for section in sections
    ]
    for one, section in zip(layouts, sections, strict=True):
        assert [is_of_layout({"layout": one}, other) for other in layouts] == [one == other for other in layouts]
        older = {name: value for name, value in one.items() if name not in ("objective", "samples")}
        assert is_of_layout({"layout": older}, one) == (len(section) == 1), "which did not say it, and had no others"


def test_freezing_leaves_the_state_of_the_optimizer_out_of_the_estimate(tmp_path: Path) -> None:
    preset = {"zero_optimization": {"stage": 1}}
    whole = MemoryEstimate(config_of(settings_of(tmp_path, "bert")), vocabulary(), preset, "cuda")
    part = MemoryEstimate(config_of(settings_of(tmp_path, "bert", "bert.encoder.*")), vocabulary(), preset, "cuda")
    assert part.parameters + part.frozen == whole.parameters
    ours, theirs = part.memory(2, 1, 1), whole.memory(2, 1, 1)
    assert (theirs.optimizer, ours.optimizer) == (12 * whole.parameters, 12 * part.parameters)
    assert ours.weights == theirs.weights and ours.peak < theirs.peak
    assert not freeze(part.module, [])
