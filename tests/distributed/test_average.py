"""`convert --average`: each weight is the mean of those of several checkpoints, and nothing else is averaged."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, AutoModelForPreTraining

from tests.commands import assert_one_card, maskwright
from tests.distributed.test_evaluate import measure
from tests.objective_cases import CASES
from tests.ranks import tiny_config, train
from tools.average import MeanFiles
from tools.convert import convert
from trainer.checkpoint.manifest import FROZEN as FROZEN_FILE
from trainer.checkpoint.manifest import KEPT, MODEL_FOLDER, read_checkpoint_manifest, write_manifest
from trainer.checkpoint.zero_files import ZeroFiles
from trainer.errors import EXIT_DAMAGED, EXIT_FINISHED, EXIT_USER_MISTAKE, DamagedError, UserError
from trainer.model.classes import GENERATOR, MAIN
from trainer.runtime.files import file_hash

PATTERNS = ["roberta.encoder.layer.0.*"]


def run(workspace: Path, folder: Path, ranks: int, **sections: Any) -> Path:
    """A run of 15 steps with a checkpoint every five."""
    own = {"checkpoint": {"every_steps": 5, "keep_last": 9}, "train": {"steps": 15}, **sections}
    assert train(tiny_config(workspace, folder, **own), ranks) == EXIT_FINISHED
    return folder


@pytest.fixture(scope="module")
def trained(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(workspace, tmp_path_factory.mktemp("zero2"), 2, deepspeed="zero2", model={"frozen": PATTERNS})


def folder_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def average(source: Path, output: Path, *names: str) -> str:
    """Convert the mean of checkpoints; returns what is said."""
    console = Console(record=True, width=300, file=open(os.devnull, "w"))
    found = convert(str(source), str(output), "float32", "5GB", console, average=names)
    assert found.difference_from_training == found.difference_after_reload == 0.0
    return console.export_text()


def assert_mean(weight: torch.Tensor, files: list[ZeroFiles], name: str) -> bool:
    """Compare with the nearest fp32 to the mean; returns whether the weights differ among each other."""
    single = [each.read_weight(name) for each in files]
    assert torch.equal(weight, torch.stack(single).double().mean(dim=0).float()), name
    return not torch.equal(single[0], single[-1])


def test_each_weight_is_the_mean_and_the_folder_can_be_evaluated(
    trained: Path, workspace: Path, tmp_path: Path
) -> None:
    said = average(trained, tmp_path / "model", "15", "step-5", str(folder_of(trained, 10)))
    assert f"the mean of 3 checkpoints of {trained} (steps 5, 10, 15)" in said
    assert "of each checkpoint 0 from the training engine's, of the mean, which training never ran, 0 after" in said
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "model")
    files = [ZeroFiles(folder_of(trained, step)) for step in (5, 10, 15)]
    weights = dict(model.named_parameters())
    assert weights.keys() == files[0].shapes.keys()
    moved = {name for name, weight in weights.items() if assert_mean(weight, files, name)}
    assert moved == weights.keys() - files[0].frozen.keys() and files[0].frozen
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "| weights | the mean of the checkpoints of steps 5, 10, 15 (arXiv:2505.12082) |" in card
    found = measure(tmp_path / "model", data=str(workspace / "data"), samples=16, seq_len=32)
    assert 0 < found["models"][0]["loss"] < 10


def test_the_newest_of_both_models_of_a_run(workspace: Path, tmp_path: Path) -> None:
    sizes = {**CASES["rtd"].sizes, **dict.fromkeys(CASES["rtd"].dropouts, 0.0)}
    sections = {
        "model": {"preset": "electra-small", "overrides": sizes},
        "objective": {"name": "rtd", "replace_mask": 0.85, "replace_random": 0.0, "generator": {"share": "nothing"}},
    }
    source = run(workspace, tmp_path / "run", 1, **sections)
    average(source, tmp_path / "model", "last:2")
    files = [ZeroFiles(folder_of(source, step)) for step in (10, 15)]
    for kind, export, prefix in (
        (AutoModelForPreTraining, MAIN, "discriminator."),
        (AutoModelForMaskedLM, GENERATOR, "generator."),
    ):
        weights = dict(kind.from_pretrained(tmp_path / "model" / export).named_parameters())
        assert sum(assert_mean(weight, files, prefix + name) for name, weight in weights.items()) > 10


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["5"], "A mean is of two checkpoints or more, and 1 is named"),
        (["5", "step-00000005"], "A checkpoint is named twice"),
        (["5", "6"], "No checkpoint at"),
        (["last:4"], "has 3 checkpoints"),
        (["last:0"], "has 3 checkpoints"),
        (["5", "no/such/folder"], "neither a checkpoint nor a run folder"),
    ],
)
def test_names_that_mean_no_two_checkpoints_are_refused(
    names: list[str], said: str, trained: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        average(trained, tmp_path / "model", *names)
    assert not list(tmp_path.iterdir())


def changed(source: Path, target: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> str:
    """Copy a checkpoint to another run folder, with another identity."""
    shutil.copytree(source, target)
    manifest = read_checkpoint_manifest(target)
    write_manifest(target, replace(manifest, identity=change(manifest.identity)))
    return str(target)


def test_a_branch_counts_and_another_run_does_not(trained: Path, tmp_path: Path) -> None:
    branch = changed(folder_of(trained, 15), folder_of(tmp_path / "branch", 15), lambda identity: identity)
    assert "(steps 10, 15)" in average(trained, tmp_path / "model", "10", branch)
    seed = changed(folder_of(trained, 15), folder_of(tmp_path / "other", 15), lambda old: {**old, "seed": 99})
    with pytest.raises(UserError, match=r"step-00000010 and step-00000015 are not of one run: seed was 3, now 99\."):
        average(trained, tmp_path / "none", "10", seed)
    assert not (tmp_path / "none").exists()


def test_what_is_not_trained_has_to_be_the_same_in_all(trained: Path, tmp_path: Path) -> None:
    folder, copy = folder_of(trained, 10), folder_of(tmp_path / "copy", 15)
    shutil.copytree(folder_of(trained, 15), copy)
    manifest, frozen = read_checkpoint_manifest(copy), load_file(copy / FROZEN_FILE)
    name = next(iter(frozen))
    assert torch.equal(MeanFiles([(folder, manifest), (copy, manifest)]).read_weight(name), frozen[name])
    save_file({**frozen, name: frozen[name] + 1}, copy / FROZEN_FILE)
    with pytest.raises(UserError, match=f"{name} is not trained, and yet differs"):
        MeanFiles([(folder, manifest), (copy, manifest)]).read_weight(name)

    save_file(frozen, copy / FROZEN_FILE)
    kept = copy / MODEL_FOLDER / KEPT
    save_file({"pooler": torch.ones(2)}, kept)
    files = {**manifest.files, f"{MODEL_FOLDER}/{KEPT}": (kept.stat().st_size, file_hash(kept))}
    files[FROZEN_FILE] = ((copy / FROZEN_FILE).stat().st_size, file_hash(copy / FROZEN_FILE))
    write_manifest(copy, replace(manifest, files=files))
    with pytest.raises(UserError, match="the weights that went past the training are others"):
        average(trained, tmp_path / "model", "10", str(copy))


def test_a_damaged_one_is_named_and_nothing_is_written(trained: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    victim = next(folder_of(copy, 10).glob("*optim_states.pt"))
    os.truncate(victim, 100)
    with pytest.raises(DamagedError, match=rf"step-00000010: {victim.name}: 100 bytes instead of"):
        average(copy, tmp_path / "model", "last:3")
    with pytest.raises(UserError, match=r"is a checkpoint, and --average is of several of a run"):
        average(folder_of(copy, 15), tmp_path / "model", "5", "15")
    output = ("--output", tmp_path / "model")
    result = maskwright("convert", copy, "--average", "5", "10", *output)
    assert_one_card(result, EXIT_DAMAGED, "step-00000010")
    result = maskwright("convert", copy, "--best", "--average", "5", "15", *output)
    assert_one_card(result, EXIT_USER_MISTAKE, "--best is one checkpoint", "--best --average 5 15")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
