"""`convert --average`: each weight is the mean of those of several checkpoints of a run, and nothing else is averaged."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForMaskedLM

from tests.commands import assert_one_card, maskwright
from tests.ranks import tiny_config, train
from tools.convert import convert
from trainer.checkpoint.manifest import read_checkpoint_manifest, write_manifest
from trainer.checkpoint.zero_files import ZeroFiles
from trainer.errors import EXIT_FINISHED, EXIT_USER_MISTAKE, DamagedError, UserError

FROZEN = ["roberta.encoder.layer.0.*"]


def run(workspace: Path, folder: Path, steps: int = 20, **changes: Any) -> Path:
    """A run of two ranks with a checkpoint every five steps."""
    sections = {"checkpoint": {"every_steps": 5, "keep_last": 9}, "train": {"steps": steps}, **changes}
    assert train(tiny_config(workspace, folder, **sections), 2) == EXIT_FINISHED
    return folder


@pytest.fixture(scope="module")
def trained(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(workspace, tmp_path_factory.mktemp("zero2"), deepspeed="zero2", model={"frozen": FROZEN})


def averaged(source: Path, output: Path, *names: str) -> str:
    """Convert the mean of checkpoints; returns what is said."""
    console = Console(record=True, width=200, quiet=False, file=open(os.devnull, "w"))
    found = convert(str(source), str(output), "float32", "5GB", console, average=names)
    assert found.difference_from_training == found.difference_after_reload == 0.0
    return console.export_text()


def folder_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def test_each_weight_is_the_mean(trained: Path, tmp_path: Path) -> None:
    said = averaged(trained, tmp_path / "model", "5", "step-10", str(folder_of(trained, 20)))
    assert "the mean of the 3 checkpoints of steps 5, 10, 20" in said
    assert "of each checkpoint 0 from the training engine's, of the mean, which training never ran, 0 after" in said
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "model")
    files = [ZeroFiles(folder_of(trained, step)) for step in (5, 10, 20)]
    weights, moved = dict(model.named_parameters()), 0
    assert weights.keys() == files[0].shapes.keys()
    for name, weight in weights.items():
        single = [each.read_weight(name) for each in files]
        exact = torch.stack([each.double() for each in single]).mean(dim=0)
        assert torch.equal(weight, exact.float()), name  # the nearest fp32 to the mean
        moved += not torch.equal(single[0], single[2])
        if name in files[0].frozen:
            assert torch.equal(weight, single[0])
    assert moved and 0 < len(files[0].frozen) < len(weights)
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "the mean of the checkpoints of steps 5, 10, 20 (arXiv:2505.12082)" in card
