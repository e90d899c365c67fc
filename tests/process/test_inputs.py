"""What `validate` opens: paths with ~, a run folder that cannot be one, and data or tokenizers that do not belong."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, RobertaConfig, RobertaForMaskedLM

from launcher.console import make_console
from tests.commands import assert_one_card, maskwright
from tests.conftest import write_text
from tests.ranks import TINY_ROBERTA, tiny_config, write_config
from tests.token_files import write_megatron
from tools.import_tokens import import_tokens
from tools.tokenizer import train_tokenizer
from trainer.config import run_folder
from trainer.config.file import load_config
from trainer.errors import EXIT_USER_MISTAKE, UserError
from trainer.inputs.inputs import Inputs, open_inputs


def test_a_tilde_is_the_home_folder(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tokenizer", "data"):
        shutil.copytree(workspace / name, tmp_path / "home" / name)
    (tmp_path / "home" / "base.yaml").write_text("deepspeed: ~/mine.json\nrun: {dir: ~/run}\n")
    (tmp_path / "home" / "mine.json").write_text('{"zero_optimization": {"stage": 2}}')
    (tmp_path / "my.yaml").write_text(
        "extends: ~/base.yaml\n"
        f"model: {{preset: roberta-base, tokenizer: ~/tokenizer, overrides: {TINY_ROBERTA}}}\n"
        "data: {train: ~/data, validation: ~/data/validation, seq_len: 32}\n"
        "train: {steps: 3, precision: fp32}\n"
    )
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    config = load_config("my.yaml")
    inputs = open_inputs(config, 1)
    assert run_folder(config) == tmp_path / "home" / "run"
    assert inputs.sources[0].folder == tmp_path / "home" / "data" / "train"
    assert inputs.validation is not None and inputs.ds_config["zero_optimization"]["stage"] == 2
    assert load_config("~/base.yaml", ["model.preset=x", "model.tokenizer=y", "data.train=z", "train.steps=1"]).run.dir
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "my.yaml"]


@pytest.mark.parametrize("place", ["file", "file/run", "file/deep/run"])
def test_a_run_folder_that_is_a_file_or_lies_in_one_is_refused(place: str, workspace: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=f"'{tmp_path}/file' is a file") as caught:
        open_inputs(tiny_config(workspace, tmp_path / place), 1)
    assert caught.value.where == f"run.dir={tmp_path / place}"
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("command", ["validate", "plan"])
def test_a_model_that_cannot_compute_a_block_is_a_card_where_its_memory_is_reckoned(
    command: str, workspace: Path, tmp_path: Path
) -> None:
    config = write_config(tiny_config(workspace, tmp_path / "run"), tmp_path / "config.yaml")
    wrong = "model.overrides.chunk_size_feed_forward=7"  # 32 tokens cannot be cut into chunks of 7
    refused = maskwright(command, config, wrong, "batch.micro_size=auto")
    assert_one_card(refused, EXIT_USER_MISTAKE, "multiple of the chunk size 7")


def test_validation_data_that_are_the_training_data_are_refused(workspace: Path, tmp_path: Path) -> None:
    (tmp_path / "other-name").symlink_to(workspace / "data" / "train")
    both, train = str(workspace / "data"), str(workspace / "data" / "train")
    evaluated = {"every_steps": 5, "samples": 8}
    for given, held_out in [(both, train), (train, train), (train, str(tmp_path / "other-name"))]:
        data = {"train": given, "validation": held_out}
        with pytest.raises(UserError, match="The validation data is the training data") as caught:
            open_inputs(tiny_config(workspace, tmp_path / "run", data=data, eval=evaluated), 1)
        assert caught.value.where == f"data.validation={held_out}"
    mixed: dict[str, Any] = {"train": [{"path": str(workspace / "data" / "validation")}, {"path": train}]}
    with pytest.raises(UserError, match="The validation data is the training data"):
        open_inputs(tiny_config(workspace, tmp_path / "run", data={**mixed, "validation": both}, eval=evaluated), 1)
    fine = tiny_config(workspace, tmp_path / "run", data={"train": both, "validation": both}, eval=evaluated)
    assert open_inputs(fine, 1).validation is not None


@pytest.fixture
def checkpoint(workspace: Path, tmp_path: Path) -> Path:
    """A Hugging Face checkpoint with the workspace's tokenizer, whose vocabulary has 500 tokens."""
    torch.manual_seed(0)
    size = len(AutoTokenizer.from_pretrained(workspace / "tokenizer"))
    RobertaForMaskedLM(RobertaConfig(**TINY_ROBERTA, vocab_size=size)).save_pretrained(tmp_path / "checkpoint")
    AutoTokenizer.from_pretrained(workspace / "tokenizer").save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def open_with(workspace: Path, tmp_path: Path, checkpoint: Path, tokenizer: Path) -> Inputs:
    """A run from the checkpoint with another tokenizer, on data of that tokenizer."""
    ids = write_megatron(tmp_path / "corpus", [[list(range(5, 45))]] * 20)
    import_tokens([str(ids)], str(tokenizer), str(tmp_path / "own-data"), console=make_console())
    model = {"preset": None, "from_pretrained": str(checkpoint), "tokenizer": str(tokenizer), "overrides": {}}
    data = {"train": str(tmp_path / "own-data")}
    return open_inputs(tiny_config(workspace, tmp_path / "run", model=model, data=data), 1)


def test_a_tokenizer_whose_ids_have_moved_against_the_checkpoints_is_said(
    workspace: Path, tmp_path: Path, checkpoint: Path
) -> None:
    text = write_text(tmp_path / "other.txt", documents=100, seed=9)
    other = train_tokenizer([str(text)], tmp_path / "other", "bytelevel-bpe", 400, make_console())
    before, now = (AutoTokenizer.from_pretrained(path).get_vocab() for path in (checkpoint, other))
    moved = sum(now.get(token) != number for token, number in before.items())
    assert 100 < moved < 500
    note = f"tokenizer: {moved:,} of the checkpoint's 500 tokens have another id or are gone"
    assert open_with(workspace, tmp_path, checkpoint, other).describe()[-1] == note


def test_a_tokenizer_that_has_only_grown_is_nothing_to_speak_of(
    workspace: Path, tmp_path: Path, checkpoint: Path
) -> None:
    grown = AutoTokenizer.from_pretrained(checkpoint)
    grown.add_tokens(["neologism"])
    grown.save_pretrained(tmp_path / "grown")
    lines = open_with(workspace, tmp_path, checkpoint, tmp_path / "grown").describe()
    assert not [line for line in lines if line.startswith("tokenizer")]


def test_a_checkpoint_without_a_tokenizer_cannot_be_compared_and_that_is_said(
    workspace: Path, tmp_path: Path, checkpoint: Path
) -> None:
    for path in checkpoint.glob("tokenizer*"):
        path.unlink()
    lines = open_with(workspace, tmp_path, checkpoint, workspace / "tokenizer").describe()
    assert f"tokenizer: {checkpoint} has none of its own, so it is not checked" in lines[-1]
    alone = tiny_config(
        workspace,
        tmp_path / "run",
        model={"preset": None, "from_pretrained": str(checkpoint), "tokenizer": None, "overrides": {}},
    )
    with pytest.raises(UserError, match="has no tokenizer of its own") as caught:
        open_inputs(alone, 1)
    assert caught.value.where == f"model.from_pretrained={checkpoint}"
