"""A run on imported tokens is the run on the same documents prepared from text."""

from __future__ import annotations

from pathlib import Path

from launcher.console import make_console
from tests.preparing import read_token_documents
from tests.ranks import losses, metrics, tiny_config, train
from tests.token_files import write_dataset, write_megatron
from tools.import_tokens import import_tokens
from trainer.data.tokenizer import load_tokenizer
from trainer.errors import EXIT_FINISHED


def test_the_losses_on_imported_tokens_are_those_on_prepared_text(workspace: Path, tmp_path: Path) -> None:
    """Training data linked from a Megatron file, validation data converted from a folder of `datasets`."""
    vocabulary = load_tokenizer(workspace / "tokenizer")
    begin, end = vocabulary.cls_token_id, vocabulary.sep_token_id
    assert isinstance(begin, int) and isinstance(end, int)
    contents = {split: read_token_documents(workspace / "data" / split) for split in ("train", "validation")}
    inputs = {
        "train": write_megatron(tmp_path / "corpus", [[[*ids, end]] for ids in contents["train"]]),
        "validation": write_dataset(tmp_path / "held-out", [[begin, *ids, end] for ids in contents["validation"]]),
    }
    for split, path in inputs.items():
        import_tokens([str(path)], str(workspace / "tokenizer"), str(tmp_path / split), console=make_console())

    common = {"train": {"steps": 12}, "eval": {"every_steps": 6, "samples": 16}}
    imported = {"train": str(tmp_path / "train"), "validation": str(tmp_path / "validation")}
    prepared = {"train": str(workspace / "data"), "validation": str(workspace / "data")}
    for name, data in (("imported", imported), ("prepared", prepared)):
        assert train(tiny_config(workspace, tmp_path / name, data=data, **common), 2) == EXIT_FINISHED
    assert len(losses(tmp_path / "imported")) == 12
    assert losses(tmp_path / "imported") == losses(tmp_path / "prepared")
    evaluations = [
        [line["eval/loss"] for line in metrics(tmp_path / name) if "eval/loss" in line]
        for name in ("imported", "prepared")
    ]
    assert len(evaluations[0]) == 3 and evaluations[0] == evaluations[1]
