"""What a masked-LM class has not goes past the training, from the source to whoever fine-tunes the converted model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForPreTraining,
)

from tests.ranks import TINY_ROBERTA, tiny_config, train
from tools.convert import convert
from trainer.checkpoint.find import locate
from trainer.errors import EXIT_FINISHED, DamagedError

QUIET = Console(quiet=True)
KEPT = {
    *("bert.pooler.dense.weight", "bert.pooler.dense.bias"),
    *("cls.seq_relationship.weight", "cls.seq_relationship.bias"),
}


@pytest.fixture(scope="module")
def source(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with all its heads, and the workspace's tokenizer."""
    folder = tmp_path_factory.mktemp("kept") / "bert"
    tokenizer = AutoTokenizer.from_pretrained(workspace / "tokenizer")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {**TINY_ROBERTA, "vocab_size": 500, "pad_token_id": 1}
    BertForPreTraining(BertConfig(**sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def trained(workspace: Path, run_dir: Path, source: Path, **sections: Any) -> Path:
    model = {"preset": None, "from_pretrained": str(source), "tokenizer": None, "overrides": {}}
    config = tiny_config(workspace, run_dir, model=model, **{"train": {"steps": 3}, **sections})
    assert train(config, 2) == EXIT_FINISHED
    return run_dir


def loaded(kind: Any, folder: Path) -> tuple[Any, dict[str, set[str]]]:
    return kind.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)


def test_a_classifier_and_the_pre_training_class_start_from_what_the_source_had(
    source: Path, workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(workspace, tmp_path / "run", source, deepspeed="zero3")
    said = capsys.readouterr().out
    assert "checkpoint: of what is not used, kept for the converted model: bert.pooler.dense.bias, " in said
    given = tmp_path / "given"  # the source is another one at the resume
    shutil.copytree(source, given)
    weights = load_file(given / "model.safetensors")
    save_file({name: weight + 1 for name, weight in weights.items()}, given / "model.safetensors", {"format": "pt"})
    run = trained(workspace, run, given, train={"steps": 5})
    convert(str(run), str(tmp_path / "model"), "float32", "50KB", QUIET)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    shards = {name: load_file(tmp_path / "model" / file)[name] for name, file in index["weight_map"].items()}
    assert shards.keys() >= KEPT
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in shards.values())

    before = BertForPreTraining.from_pretrained(source).state_dict()
    assert all(torch.equal(shards[name], before[name]) for name in KEPT), "bit for bit"
    changed = "bert.embeddings.word_embeddings.weight"
    assert not torch.equal(shards[changed], before[changed]), "and the rest was trained"
    classifier, report = loaded(AutoModelForSequenceClassification, tmp_path / "model")
    assert report["missing_keys"] == {"classifier.weight", "classifier.bias"}
    assert torch.equal(classifier.bert.pooler.dense.weight, before["bert.pooler.dense.weight"])
    for kind in (AutoModel, BertForPreTraining):
        assert not loaded(kind, tmp_path / "model")[1]["missing_keys"]
    assert loaded(AutoModelForMaskedLM, tmp_path / "model")[1]["unexpected_keys"] == KEPT
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"| kept | {', '.join(f'`{name}`' for name in sorted(KEPT))}: as in {given}, untrained |" in card

    again = trained(workspace, tmp_path / "again", tmp_path / "model")
    convert(str(again), str(tmp_path / "half"), "float16", "5GB", QUIET)
    half = load_file(tmp_path / "half" / "model.safetensors")
    assert all(torch.equal(half[name], before[name].half()) for name in KEPT), "and so on to the next training"


def test_they_are_part_of_the_checkpoint(source: Path, workspace: Path, tmp_path: Path) -> None:
    run = trained(workspace, tmp_path / "run", source)
    folder, manifest = locate(run)
    assert "huggingface/kept.safetensors" in manifest.files
    (folder / "huggingface" / "kept.safetensors").write_bytes(b"")
    with pytest.raises(DamagedError, match=r"kept\.safetensors: 0 bytes instead of"):
        convert(str(folder), str(tmp_path / "model"), "float32", "5GB", QUIET)


def test_a_model_that_lacks_nothing_has_nothing_beside_it(workspace: Path, tmp_path: Path) -> None:
    assert train(tiny_config(workspace, tmp_path / "run", train={"steps": 1}), 1) == EXIT_FINISHED
    assert not any("kept" in name for name in locate(tmp_path / "run")[1].files)
    convert(str(tmp_path / "run"), str(tmp_path / "model"), "float32", "5GB", QUIET)
    assert not loaded(AutoModelForMaskedLM, tmp_path / "model")[1]["unexpected_keys"]
    assert "| kept |" not in (tmp_path / "model" / "README.md").read_text()
