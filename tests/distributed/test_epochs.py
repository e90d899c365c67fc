"""A run of epochs ends with its last sample: in another layout, after a resume, and as runs did that began before."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.faults import assert_same_weights, train_with, with_dropout
from tests.ranks import losses, metrics, tiny_config, train
from tools.validate import validate
from trainer.checkpoint.manifest import RUN_CONFIG, read_checkpoint_manifest, write_manifest
from trainer.config import Config
from trainer.errors import EXIT_FINISHED
from trainer.inputs.inputs import open_inputs
from trainer.runtime.files import file_hash

BATCH = {"global_size": 12, "micro_size": 2}


def of_epochs(make: Any, workspace: Path, run_dir: Path, **sections: Any) -> Config:
    """Of 101 samples: eight steps of 12 and one of 5. What follows from the length is left out."""
    (blocks,) = open_inputs(tiny_config(workspace, run_dir), 1).order.orders[0].blocks
    epochs = math.floor(Fraction(101, blocks) * 10**6) / 10**6
    assert math.ceil(Fraction(str(epochs)) * blocks) == 101
    given = {"batch": BATCH, "train": {"steps": None, "epochs": epochs}, "schedule": {"warmup_steps": None}}
    return make(workspace, run_dir, **{**given, "checkpoint": {"every_steps": 4, "keep_last": 9}, **sections})


def remove_checkpoint(config: Config, step: int) -> None:
    shutil.rmtree(Path(config.run.dir) / "checkpoints" / f"step-{step:08d}")


def test_it_ends_to_the_sample_and_a_resume_is_bit_exact(workspace: Path, tmp_path: Path) -> None:
    clean, config = (of_epochs(with_dropout, workspace, tmp_path / name) for name in ("clean", "run"))
    for one in (clean, config):
        assert train(one, 2) == EXIT_FINISHED
    lines = metrics(tmp_path / "clean")
    assert [line["batch/global_size"] for line in lines] == [12] * 8 + [5]
    assert (lines[-1]["samples"], lines[-1]["tokens"]) == (101, 101 * 32)
    remove_checkpoint(config, 9)
    assert train(config, 2) == EXIT_FINISHED
    assert losses(tmp_path / "run") == losses(tmp_path / "clean")
    assert_same_weights(tmp_path / "run", tmp_path / "clean")


@pytest.mark.parametrize(("ranks", "micro_size", "preset"), [(3, 4, "zero2"), (2, 6, "zero3")])
def test_other_ranks_and_micro_batches_follow_the_same_steps(
    ranks: int, micro_size: int, preset: str, workspace: Path, tmp_path: Path
) -> None:
    """On one rank 5 sequences fill up three micro-batches of 2 but for one; on three ranks one pass of 12."""
    one = of_epochs(tiny_config, workspace, tmp_path / "one")
    more = of_epochs(
        tiny_config, workspace, tmp_path / "more", batch={**BATCH, "micro_size": micro_size}, deepspeed=preset
    )
    assert train(one, 1) == train(more, ranks) == EXIT_FINISHED
    for line, other in zip(metrics(tmp_path / "one"), metrics(tmp_path / "more"), strict=True):
        assert (other["samples"], other["train/learning_rate"]) == (line["samples"], line["train/learning_rate"])
        assert other["train/loss"] == pytest.approx(line["train/loss"], abs=1e-5)
        assert other["train/grad_norm"] == pytest.approx(line["train/grad_norm"], rel=1e-4)


def as_written_before(checkpoint: Path) -> None:
    """Make the config in a checkpoint one of the version that knew no sets of defaults."""
    path = checkpoint / RUN_CONFIG
    config = yaml.safe_load(path.read_text())
    assert config.pop("defaults") == 1
    config["schedule"].pop("warmup_fraction")
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    manifest = read_checkpoint_manifest(checkpoint)
    files = {**manifest.files, RUN_CONFIG: (path.stat().st_size, file_hash(path))}
    write_manifest(checkpoint, replace(manifest, files=files))


def test_a_run_that_began_before_goes_on_as_it_began(workspace: Path, tmp_path: Path) -> None:
    """A warm-up of 1,000 steps in a run of nine, and epochs up to whole steps, though the config now says otherwise."""
    began, config = (of_epochs(with_dropout, workspace, tmp_path / "run", defaults=number) for number in (1, 2))
    clean = of_epochs(with_dropout, workspace, tmp_path / "clean", defaults=1)
    for one in (clean, began):
        assert train(one) == EXIT_FINISHED
    assert metrics(tmp_path / "clean")[-1]["samples"] == 9 * 12
    assert metrics(tmp_path / "clean")[-1]["train/learning_rate"] == pytest.approx(config.optimizer.lr * 9 / 1000)
    for step in (8, 9):
        remove_checkpoint(began, step)
    as_written_before(tmp_path / "run" / "checkpoints" / "step-00000004")
    described = "\n".join(validate(config, 1))
    assert "WITHIN THE WARM-UP of 1,000 steps" in described and "9 steps" in described

    outcome = train_with(config, world_size=1)

    assert outcome.codes == [EXIT_FINISHED], outcome.output
    assert "changed since" not in outcome.output
    assert losses(tmp_path / "run") == losses(tmp_path / "clean")
    assert_same_weights(tmp_path / "run", tmp_path / "clean")
    assert "defaults: 1\n" in (tmp_path / "run" / "checkpoints" / "step-00000009" / RUN_CONFIG).read_text()
    forked = config.model_copy(update={"run": config.run.model_copy(update={"dir": str(tmp_path / "fork")})})
    newest = tmp_path / "run" / "checkpoints" / "step-00000008"
    assert train_with(forked, world_size=1, resume=str(newest)).codes == [EXIT_FINISHED]
    assert metrics(tmp_path / "fork")[-1]["train/loss"] == losses(tmp_path / "clean")[-1]
    fresh = train_with(config, world_size=1, resume="never")
    assert fresh.codes == [EXIT_FINISHED] and "1 steps of warm-up" in fresh.output
    assert metrics(tmp_path / "run")[-1]["samples"] == 101
