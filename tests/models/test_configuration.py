"""What a model section of a config is refused for; each message names the key and the remedy."""

from __future__ import annotations

import dataclasses
import json

import pytest

from tests.tiny_models import (
    SEQ_LEN,
    VOCABULARY_SIZE,
    continued,
    preset,
    saved,
    sizes,
    tiny_roberta,
    vocabulary,
    write_config,
)
from trainer.config import ModelConfig
from trainer.errors import UserError
from trainer.model.build import build_model
from trainer.model.hf_config import build_config


def refused(settings: ModelConfig, seq_len: int = 64, size: int = VOCABULARY_SIZE) -> UserError:
    with pytest.raises(UserError) as caught:
        build_model(settings, vocabulary(size), seq_len, 0)
    return caught.value


def test_unknown_preset():
    error = refused(preset("roberta-bse"))
    assert error.problem == "No preset 'roberta-bse'. Did you mean 'roberta-base'?"
    assert error.where == "model.preset"


def test_unknown_override():
    error = refused(preset(hiden_size=64))
    assert error.problem == "RobertaConfig has no field 'hiden_size'. Did you mean 'hidden_size'?"
    assert error.where == "model.overrides.hiden_size"


@pytest.mark.parametrize("name", ["vocab_size", "pad_token_id", "dtype", "is_decoder", "model_type"])
def test_overrides_that_others_decide(name):
    assert refused(preset(**{name: 1})).problem.startswith(f"'{name}' cannot be overridden")


@pytest.mark.parametrize(
    ("name", "value"), [("hidden_size", "big"), ("hidden_dropout_prob", "none"), ("num_hidden_layers", 2.5)]
)
def test_override_of_the_wrong_type(name, value):
    error = refused(preset(**{name: value}))
    assert error.where == f"model.overrides.{name}"
    assert repr(value) in error.problem


def test_sizes_that_do_not_fit():
    error = refused(preset(hidden_size=100))
    assert error.problem == "hidden_size 100 is not divisible by num_attention_heads 12."
    assert "model.overrides.hidden_size" in error.remedy
    assert refused(preset(num_hidden_layers=0)).problem == "num_hidden_layers must be at least 1, got 0."


def test_key_value_heads_that_do_not_divide(tmp_path):
    error = refused(write_config(tmp_path, "eurobert", num_key_value_heads=3), SEQ_LEN)
    assert error.problem == "num_attention_heads 4 is not divisible by num_key_value_heads 3."


def test_unknown_activation():
    assert "cannot" not in refused(tiny_roberta(hidden_act="gellu")).problem
    assert "gellu" in refused(tiny_roberta(hidden_act="gellu")).problem


def test_padding_id_beyond_the_position_table(tmp_path):
    late = dataclasses.replace(vocabulary(1000), pad_id=999)
    with pytest.raises(UserError) as caught:
        build_config(write_config(tmp_path, "roberta"), late, SEQ_LEN)
    assert "use a tokenizer whose special tokens come first" in caught.value.remedy


@pytest.mark.parametrize(
    ("name", "seq_len", "needed", "longest"),
    [("roberta-base", 513, 515, 512), ("bert-base", 513, 513, 512), ("modernbert-base", 9000, 9000, 8192)],
)
def test_seq_len_beyond_the_positions(name, seq_len, needed, longest):
    build_config(preset(name), vocabulary(), longest)
    with pytest.raises(UserError) as caught:
        build_config(preset(name), vocabulary(), seq_len)
    assert caught.value.where == "data.seq_len"
    assert f"model.overrides.max_position_embeddings={needed}" in caught.value.remedy
    assert f"data.seq_len to at most {longest}" in caught.value.remedy
    build_config(preset(name, max_position_embeddings=needed), vocabulary(), seq_len)


def test_seq_len_beyond_a_checkpoints_positions(tmp_path):
    error = refused(continued(saved(tmp_path, "roberta")), seq_len=63)
    assert "max_position_embeddings" not in error.remedy
    assert error.remedy == "Set data.seq_len to at most 62."


def test_config_that_is_none(tmp_path):
    nowhere = ModelConfig(config=str(tmp_path / "nowhere"), tokenizer="unused")
    assert refused(nowhere).where == "model.config"
    (tmp_path / "config.json").write_text("{oops")
    assert "Not valid JSON in" in refused(ModelConfig(config=str(tmp_path), tokenizer="unused")).problem
    (tmp_path / "config.json").write_text("{}")
    assert "names no model_type" in refused(ModelConfig(config=str(tmp_path), tokenizer="unused")).problem


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"model_type": "robertaa"}, "Model type 'robertaa' is not known"),
        ({"model_type": "gpt2"}, "'gpt2', as configured, is no encoder"),
        ({"model_type": "bart"}, "'bart', as configured, is no encoder"),
        ({**sizes("roberta"), "is_decoder": True}, "'roberta', as configured, is no encoder"),
    ],
)
def test_model_types_without_a_masked_lm_encoder(fields, problem, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert refused(ModelConfig(config=str(tmp_path), tokenizer="unused")).problem.startswith(problem)


def test_checkpoint_that_is_not_there(tmp_path):
    error = refused(continued(tmp_path / "nowhere"))
    assert error.where == "model.from_pretrained"
    assert str(tmp_path / "nowhere") in error.problem


def test_checkpoint_that_is_broken(tmp_path):
    folder = saved(tmp_path, "roberta")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert refused(continued(folder), SEQ_LEN).problem.startswith(f"Cannot load weights from '{folder}'")
    (folder / "model.safetensors").unlink()
    assert refused(continued(folder), SEQ_LEN).where == "model.from_pretrained"


def test_checkpoint_without_the_encoders_weights(tmp_path):
    folder = saved(tmp_path, "roberta")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    error = refused(continued(folder), SEQ_LEN)
    assert "lacks 16 weights of the encoder of RobertaForMaskedLM: roberta.encoder.layer.2." in error.problem
    assert error.problem.endswith("and 10 more.")


@pytest.mark.parametrize(
    ("model_type", "name", "value"),
    [
        ("roberta", "hidden_size", 64),
        ("roberta", "num_attention_heads", 2),
        ("roberta", "max_position_embeddings", 128),
        ("albert", "num_hidden_layers", 3),
    ],
)
def test_overrides_that_change_a_checkpoints_shapes(model_type, name, value, tmp_path):
    error = refused(continued(saved(tmp_path, model_type), hidden_dropout_prob=0.2, **{name: value}), SEQ_LEN)
    assert error.where == f"model.overrides.{name}"
    assert "changes the shape" in error.problem
