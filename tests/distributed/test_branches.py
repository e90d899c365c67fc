"""A stable run and branches cut off from its checkpoints, each with a decay of its own: what wsd is for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.commands import assert_one_card, maskwright
from tests.ranks import losses, metrics, tiny_config, train, write_config
from trainer.config import Config
from trainer.errors import EXIT_FINISHED, EXIT_USER_MISTAKE
from trainer.runtime.files import file_hash

STEPS, BRANCHED, DECAY = 12, 6, 4
PEAK = 5.0e-3


def stable(workspace: Path, run_dir: Path, **sections: Any) -> Config:
    """A trunk of 12 steps that is constant after its warm-up."""
    defaults: dict[str, Any] = {
        "schedule": {"name": "constant", "warmup_steps": 2},
        "train": {"steps": STEPS},
        "checkpoint": {"every_steps": 2, "keep_last": 99},
    }
    return tiny_config(workspace, run_dir, **{**defaults, **sections})


@pytest.fixture(scope="module")
def trunk(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = stable(workspace, tmp_path_factory.mktemp("trunk") / "run")
    assert train(config) == EXIT_FINISHED
    return config


def hashes(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): file_hash(path) for path in folder.rglob("*") if path.is_file()}


def test_a_branch_decays_from_where_it_is_cut_off_and_the_trunk_stays_what_it_is(
    trunk: Config, workspace: Path, tmp_path: Path
) -> None:
    folder, branch = Path(trunk.run.dir), tmp_path / "branch"
    before, path = hashes(folder), write_config(trunk, tmp_path / "trunk.yaml")
    checkpoint = folder / "checkpoints" / f"step-{BRANCHED:08d}"
    command = ("train", path, f"run.dir={branch}", "schedule.name=wsd", "schedule.decay=1-sqrt",
               f"schedule.decay_steps={DECAY}", "--resume", checkpoint)  # fmt: skip
    done = maskwright(*command, f"train.steps={BRANCHED + DECAY}")
    assert done.returncode == EXIT_FINISHED, done.stdout + done.stderr
    assert f"resuming from step-{BRANCHED:08d} at step {BRANCHED}" in done.stdout
    assert "schedule.name constant → wsd" in done.stdout, "what differs from the trunk is said"
    lines = [line for line in metrics(branch) if "train/loss" in line]
    assert [line["step"] for line in lines] == list(range(BRANCHED + 1, BRANCHED + DECAY + 1))
    assert lines[0]["train/loss"] == losses(folder)[BRANCHED], "the weights and the data of the trunk, to the bit"
    assert lines[2]["train/loss"] != losses(folder)[BRANCHED + 2]
    rates = [PEAK * (1 - (done / DECAY) ** 0.5) for done in range(1, DECAY + 1)]
    assert [line["train/learning_rate"] for line in lines] == pytest.approx(rates, abs=1e-12)
    assert hashes(folder) == before

    words = f"of {folder} at step {BRANCHED}"
    assert f"branch      {words}" in maskwright("status", branch).stdout
    assert json.loads(maskwright("status", branch, "--json").stdout)["branch_of"] == str(checkpoint)
    assert "branch" not in maskwright("status", folder).stdout

    finished = maskwright(*command, f"train.steps={BRANCHED + DECAY}")
    assert finished.returncode == EXIT_FINISHED and "nothing changed" in finished.stdout
    shutil.rmtree(branch / "checkpoints" / f"step-{BRANCHED + DECAY:08d}")
    again = maskwright(*command, f"train.steps={BRANCHED + DECAY}")
    assert "resuming from step-00000008 at step 8 (--resume auto)" in again.stdout, "the same command goes on"
    assert again.returncode == EXIT_FINISHED
    repeated = [line for line in metrics(branch) if "train/loss" in line]
    assert [line["train/loss"] for line in repeated] == [line["train/loss"] for line in lines]
    assert words in maskwright("status", branch).stdout

    other = folder / "checkpoints" / "step-00000004"
    refused = maskwright(*command[:-1], other, f"train.steps={BRANCHED + DECAY}")
    assert_one_card(refused, EXIT_USER_MISTAKE, "is a checkpoint of another run", "Give a new run.dir")
    assert hashes(folder) == before


def test_a_decay_that_does_not_fit_is_refused_before_anything_is_written(trunk: Config, tmp_path: Path) -> None:
    path, checkpoint = (
        write_config(trunk, tmp_path / "trunk.yaml"),
        Path(trunk.run.dir) / "checkpoints" / "step-00000006",
    )
    command = (path, f"run.dir={tmp_path / 'new'}", "schedule.name=wsd", "schedule.decay_steps=11")
    words = ("would begin its decay of 11 before the end of its warm-up of 2", "schedule.decay_steps=11", "10 or fewer")
    assert_one_card(maskwright("train", *command, "--resume", checkpoint), EXIT_USER_MISTAKE, *words)
    for tool in ("validate", "plan"):
        assert_one_card(maskwright(tool, *command), EXIT_USER_MISTAKE, *words)
    assert not (tmp_path / "new" / "checkpoints").exists()
