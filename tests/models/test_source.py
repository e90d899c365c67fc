"""Folders to continue from as they are in the wild: what they are is found out and said, or the card names the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForPreTraining

from tests.tiny_models import SEQ_LEN, continued, saved, sizes, tiny_model, vocabulary
from trainer.config.file import load_config
from trainer.errors import UserError
from trainer.model.build import build_model
from trainer.model.rehearsal import rehearse
from trainer.model.source import check_source, source_note


def bert_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Those of Google's releases: pooler, next-sentence head, and gamma and beta for norms."""
    weights = BertForPreTraining(tiny_model(folder, "bert").config).state_dict()
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for now, before in old.items():
        weights = {name.replace(now, before): weight.clone() for name, weight in weights.items()}
    return weights


def published(folder: Path, weights: Any, config: str = "config.json", **fields: Any) -> Path:
    """A folder with a config of BERT's sizes, these fields and these weights as pytorch_model.bin."""
    source = folder / "published"
    source.mkdir()
    described = {**sizes("bert"), "vocab_size": 200, "pad_token_id": 1, **fields}
    described = {name: value for name, value in described.items() if value is not None}
    (source / config).write_text(json.dumps(described))
    torch.save(weights, source / "pytorch_model.bin")
    return source


def refused(source: Path | str) -> UserError:
    with pytest.raises(UserError) as caught:
        rehearse(continued(source), vocabulary(), [SEQ_LEN])
    return caught.value


@pytest.mark.parametrize(
    ("config", "model_type", "said"),
    [
        ("config.json", "roberta", "(config.json says 'roberta')"),
        ("config.json", "electra", "(config.json says 'electra')"),
        ("config.json", None, "(its config names none)"),
        ("bert_config.json", None, "(its config names none)"),
        ("ernie_config.json", None, "(its config names none)"),
    ],
)
def test_the_names_of_the_weights_decide_the_model_type(config: str, model_type: str, said: str, tmp_path: Path):
    weights = bert_weights(tmp_path)
    source = published(tmp_path, weights, config, model_type=model_type)
    settings = continued(source)
    rehearse(settings, vocabulary(), [SEQ_LEN])
    assert source_note(settings) == f"model type: bert, as the names of the weights are {said}"
    model = build_model(settings, vocabulary(), SEQ_LEN, 0).model
    assert type(model).__name__ == "BertForMaskedLM"
    layer = "bert.encoder.layer.1.output"
    assert torch.equal(model.get_parameter(f"{layer}.dense.weight"), weights[f"{layer}.dense.weight"])
    assert torch.equal(model.get_parameter(f"{layer}.LayerNorm.weight"), weights[f"{layer}.LayerNorm.gamma"])


@pytest.mark.parametrize("model_type", ["bert", "roberta", "xlm-roberta", "camembert", "electra"])
def test_a_config_that_fits_its_weights_decides(model_type: str, tmp_path: Path):
    settings = continued(saved(tmp_path, model_type))
    rehearse(settings, vocabulary(), [SEQ_LEN])
    assert source_note(settings) == ""


@pytest.mark.parametrize("model_type", ["nezha", "nezha2"])
def test_weights_of_another_class_that_do_not_fit_as_bert_are_refused(model_type: str, tmp_path: Path):
    """The weights of NEZHA's own releases are called bert.*, and have no table of positions."""
    weights = {name: weight for name, weight in bert_weights(tmp_path).items() if "position_emb" not in name}
    error = refused(published(tmp_path, weights, model_type=model_type))
    if model_type == "nezha2":
        assert "Model type 'nezha2' is not known" in error.problem
        return
    assert "lacks 35 weights of the encoder of NezhaForMaskedLM: nezha.embeddings.LayerNorm.bias, " in error.problem
    assert "save its weights with `name.replace('bert.', 'nezha.', 1)` for each name" in error.remedy
    renamed = {name.replace("bert.", "nezha.", 1): weight for name, weight in weights.items()}
    torch.save(renamed, tmp_path / "published" / "pytorch_model.bin")
    rehearse(continued(tmp_path / "published"), vocabulary(), [SEQ_LEN])


def test_no_type_and_weights_that_do_not_tell_one(tmp_path: Path):
    weights = {name.removeprefix("bert."): weight for name, weight in bert_weights(tmp_path).items()}
    source = published(tmp_path, weights, model_type=None)
    (source / "vocab.txt").write_text("[PAD]\n")
    error = refused(source)
    assert "names no model_type" in error.problem
    assert '"model_type": "bert"' in error.remedy


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_the_prefix_of_a_wrapper_is_named(prefix: str, tmp_path: Path):
    weights = {prefix + name: weight for name, weight in bert_weights(tmp_path).items()}
    error = refused(published(tmp_path, weights))
    assert f"begin with '{prefix}', which a wrapper has put there" in error.problem
    assert f"removeprefix('{prefix}')" in error.remedy


def test_a_training_checkpoint_is_told_from_weights(tmp_path: Path):
    error = refused(published(tmp_path, {"state_dict": bert_weights(tmp_path), "epoch": 3}))
    assert "is a training checkpoint: its weights lie under 'state_dict'" in error.problem


def test_a_pickle_of_more_than_weights_is_not_run(tmp_path: Path):
    error = refused(published(tmp_path, {"hook": print, **bert_weights(tmp_path)}))
    assert "holds more than weights, which would be code to run" in error.problem
    assert "weights_only" not in str(error)


def test_shapes_that_differ_are_listed(tmp_path: Path):
    error = refused(published(tmp_path, bert_weights(tmp_path), vocab_size=236, type_vocab_size=3))
    assert "bert.embeddings.word_embeddings.weight has [200, 32], the config makes [236, 32]" in error.problem
    assert "bert.embeddings.token_type_embeddings.weight has [2, 32], the config makes [3, 32]" in error.problem


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path):
    source = published(tmp_path, {})
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 409151\n"
    for name in ("pytorch_model.bin", "tokenizer.json"):
        (source / name).write_text(pointer)
    error = refused(source)
    assert "a pointer in the place of pytorch_model.bin, tokenizer.json" in error.problem
    assert error.remedy == "Run `git lfs pull` in that folder."


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_that_are_cut_short(name: str, tmp_path: Path):
    folder = saved(tmp_path, "bert")
    if name.endswith(".bin"):
        torch.save(load_file(folder / "model.safetensors"), folder / name)
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes((folder / name).read_bytes()[:1500])
    error = refused(folder)
    assert f"{name} is cut short or damaged" in error.problem or "or is damaged" in error.problem


def test_weights_that_are_not_there(tmp_path: Path):
    folder = saved(tmp_path, "bert")
    (folder / "model.safetensors").rename(folder / "tf_model.h5")
    assert "neither a model.safetensors nor a pytorch_model.bin, only tf_model.h5" in refused(folder).problem
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "and there is no such file" in refused(folder).problem
    (folder / "model.safetensors.index.json").write_text("[]")
    assert "is no index of weight files" in refused(folder).problem


def test_sharded_weights_are_all_looked_at(tmp_path: Path):
    tiny_model(tmp_path, "bert").save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    rehearse(continued(tmp_path / "sharded"), vocabulary(), [SEQ_LEN])
    part = sorted((tmp_path / "sharded").glob("model-*.safetensors"))[1]
    weights = load_file(part)
    lost = next(name for name in sorted(weights) if name.startswith("bert."))
    save_file({name: weight for name, weight in weights.items() if name != lost} or {"x": torch.zeros(1)}, part)
    assert lost in refused(tmp_path / "sharded").problem


def test_a_run_in_the_place_of_a_model_names_the_command(tmp_path: Path):
    step = tmp_path / "my run" / "checkpoints" / "step-00000020"
    step.mkdir(parents=True)
    (step / "manifest.json").write_text("{}")
    for given in (tmp_path / "my run", step):
        with pytest.raises(UserError) as caught:
            check_source(str(given))
        assert f"`maskwright convert '{given}' --output 'my run-model'`" in caught.value.remedy
        assert caught.value.where == "model.from_pretrained"


def test_a_model_to_continue_from_has_its_own_tokenizer_unless_one_is_named():
    given = ["run.dir=runs/x", "data.train=data"]
    config = load_config("roberta-base", [*given, "model.from_pretrained=m"])
    assert (config.model.preset, config.model.from_pretrained, config.model.tokenizer) == (None, "m", None)
    for pair in (["model.tokenizer=t", "model.from_pretrained=m"], ["model.from_pretrained=m", "model.tokenizer=t"]):
        config = load_config("roberta-base", [*given, *pair])
        assert (config.model.from_pretrained, config.model.tokenizer) == ("m", "t")
    assert load_config("roberta-base", [*given, "model.preset=bert-base"]).model.tokenizer == "tokenizer"


def test_a_file_that_extends_a_recipe_drops_its_tokenizer_too(tmp_path: Path):
    path = tmp_path / "more.yaml"
    path.write_text("extends: roberta-base\nrun: {dir: r}\ndata: {train: d}\nmodel: {from_pretrained: m}\n")
    assert load_config(path).model.tokenizer is None
    path.write_text(
        "extends: roberta-base\nrun: {dir: r}\ndata: {train: d}\nmodel: {from_pretrained: m, tokenizer: t}\n"
    )
    assert load_config(path).model.tokenizer == "t"
