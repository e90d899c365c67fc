"""Which weights are Muon's: the matrices of an encoder's layers, and nothing that has rows for tokens or classes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from tests.models.test_frozen_weights import settings_of
from tests.tiny_models import SEQ_LEN, family_of_type, tiny_model, vocabulary, write_config
from trainer.config import Config, ModelConfig
from trainer.config.file import parse_config
from trainer.errors import UserError
from trainer.model.classes import DETECTING, MAIN
from trainer.model.hidden_matrices import hidden_matrices, require_matrices
from trainer.model.trained import build_trained, rehearse_trained
from trainer.sizing.memory_estimate import MemoryEstimate
from trainer.sizing.update_memory import muon_workspace, stable_adamw_workspace

_BERTS = 2 * 6  # two layers: query, key, value, what follows them, and the two of the feed-forward
MATRICES = {
    "bert": _BERTS,
    "roberta": _BERTS,
    "nezha": _BERTS,
    "electra": _BERTS,
    "deberta-v2": 2 * 8,  # and the two that relative positions pass through
    "distilbert": _BERTS,
    "albert": 2 * 6,  # of two groups, which five layers share
    "modernbert": 4 * 4,  # query, key and value in one
    "gpt2": 2 * 4,
    "llama": 2 * 7,
    "xlnet": 2 * 2,  # the attention has weights of three dimensions
}


@pytest.mark.parametrize("model_type", MATRICES)
def test_the_matrices_are_those_of_the_layers(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(tmp_path, model_type, family=family_of_type(model_type))
    names = hidden_matrices(model, {MAIN: model})
    assert len(names) == MATRICES[model_type], names
    encoder = {id(weight) for weight in model.base_model.parameters()}
    outside = [model.get_input_embeddings(), model.get_output_embeddings()]
    tables = {id(module.weight) for module in outside if module is not None}
    for name in names:
        weight = model.get_parameter(name)
        assert weight.ndim == 2 and id(weight) in encoder and id(weight) not in tables
        assert any(part.isdigit() for part in name.split(".")) and "embed" not in name and "pooler" not in name
    line = require_matrices(model, {MAIN: model})
    assert ("three dimensions" in line) == (model_type == "xlnet")


def config_of(settings: ModelConfig, name: str = "muon", **sections: object) -> Config:
    raw = {
        "run": {"dir": "unused"},
        "model": settings.model_dump(),
        "data": {"train": "unused", "seq_len": SEQ_LEN},
        "train": {"steps": 1, "precision": "fp32"},
        "optimizer": {"name": name},
        **sections,
    }
    return parse_config(raw, "test")


def test_both_models_of_replaced_token_detection_have_matrices(tmp_path: Path) -> None:
    config = config_of(write_config(tmp_path, "electra"), objective={"name": "rtd"})
    built = build_trained(config, vocabulary(), DETECTING)
    names = hidden_matrices(built.module, built.exports)
    assert len({name.split(".")[0] for name in names}) == 2 and len(names) == 2 * _BERTS
    assert any(note.startswith("optimizer: Muon updates 24 matrices") for note in built.notes)


def test_a_run_whose_matrices_are_all_frozen_is_refused_at_once(tmp_path: Path) -> None:
    config = config_of(settings_of(tmp_path, "bert", "bert.encoder.*"))
    for start in (
        lambda: build_trained(config, vocabulary(), "masked"),
        lambda: rehearse_trained(config, vocabulary(), [SEQ_LEN], "masked"),
    ):
        with pytest.raises(UserError) as caught:
            start()
        assert caught.value.where == "optimizer.name=muon" and "model.frozen" in caught.value.remedy
    other = config_of(settings_of(tmp_path, "bert", "bert.encoder.*"), "adamw")
    rehearse_trained(other, vocabulary(), [SEQ_LEN], "masked")


def test_the_memory_has_one_moment_less_and_room_to_work(tmp_path: Path) -> None:
    preset = {"zero_optimization": {"stage": 1, "reduce_bucket_size": 1000}}
    found = {}
    for name in ("adamw", "stable_adamw", "muon"):
        estimate = MemoryEstimate(config_of(write_config(tmp_path, "bert"), name), vocabulary(), preset, "cpu")
        found[name] = estimate.memory(1, 2, 1), estimate
    muon, estimate = found["muon"]
    shapes = estimate.matrix_shapes
    assert estimate.matrices == sum(map(math.prod, shapes)) == 2 * (4 * 32 * 32 + 2 * 32 * 48)
    adamw = found["adamw"][0]
    assert adamw.optimizer - muon.optimizer == 4 * estimate.matrices // 2
    assert muon.update - adamw.update == muon_workspace(shapes, 1, 2, on_cpu=True) - 4 * estimate.matrices // 2
    stable = found["stable_adamw"][0]
    assert stable == replace(adamw, update=adamw.update + stable_adamw_workspace(estimate.parameter_sizes, 2))
