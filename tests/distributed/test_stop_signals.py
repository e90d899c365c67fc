"""Requests to stop at bad moments: one save, the same step on all ranks, exit code 75, and a resume bit for bit."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.fault_points import Fault, Point, at_save
from tests.faults import assert_resumes, train_with, whole_checkpoints, with_dropout
from tests.ranks import losses
from trainer.config import Config
from trainer.errors import EXIT_FINISHED, EXIT_STOPPED_AFTER_SAVING
from trainer.tracking.status import read_status

SECTIONS: dict[str, Any] = {
    "train": {"steps": 12},
    "checkpoint": {"every_steps": 4},
    "data": {"workers": 1},
    "eval": {"every_steps": 6, "samples": 8},
}


@dataclass(frozen=True)
class Send:
    """Sends a signal to this process, some times, and first to its loader workers as a SLURM step's signal is."""

    number: signal.Signals
    times: int = 1

    def __call__(self) -> None:
        own = os.getpid()
        workers = [int(pid) for pid in Path(f"/proc/{own}/task/{own}/children").read_text().split()]
        for _ in range(self.times):
            for pid in (*workers, own):
                os.kill(pid, self.number)


def config_of(workspace: Path, run_dir: Path) -> Config:
    base = with_dropout(workspace, run_dir, **SECTIONS)
    validation = {
        "data": {**base.data.model_dump(), "train": str(workspace / "data"), "validation": str(workspace / "data")}
    }
    return with_dropout(workspace, run_dir, **{**SECTIONS, **validation})


@pytest.fixture(scope="module")
def clean(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = config_of(workspace, tmp_path_factory.mktemp("clean"))
    assert train_with(config).codes == [EXIT_FINISHED] * 2
    return config


START: Point = (("read", r"\.tok$"),)
STEP_1: Point = (("write", r"/metrics\.jsonl$"), ("rename", r"status\.json$"), ("rename", r"status\.json$"))
SAVE = at_save("before the manifest", 8)


@pytest.mark.parametrize(
    ("point", "ranks", "send"),
    [
        (START, (0, 1), Send(signal.SIGUSR1, times=2)),
        (STEP_1, (0,), Send(signal.SIGTERM)),
        (SAVE, (0,), Send(signal.SIGUSR1, times=2)),
        (SAVE, (0,), Send(signal.SIGTERM, times=2)),
    ],
    ids=["all ranks twice while they start", "before step 1", "twice in a save", "terminated twice in a save"],
)
def test_a_signal_to_ranks_and_their_live_workers_saves_once_at_one_step(
    point: Point, ranks: tuple[int, ...], send: Send, clean: Config, workspace: Path, tmp_path: Path
) -> None:
    config = config_of(workspace, tmp_path)
    outcome = train_with(config, *(Fault(rank, point, send) for rank in ranks))
    assert outcome.codes == [EXIT_STOPPED_AFTER_SAVING] * 2
    newest = whole_checkpoints(tmp_path)[0]
    assert outcome.output.count(f"stopped at step {newest} on {send.number.name}") == 1
    assert outcome.output.count(f"saved {tmp_path}/checkpoints/step-{newest:08d}") == 1, "one save"
    assert "DataLoader worker" not in outcome.output, "the workers survive"
    status = read_status(tmp_path)
    assert status is not None
    assert (status.state, status.reason, status.step) == ("stopped", send.number.name, newest)
    assert status.last_checkpoint == f"step-{newest:08d}"
    assert_resumes(config, clean, f"resuming from step-{newest:08d}")
    assert len(losses(tmp_path)) == 12
    status = read_status(tmp_path)
    assert status is not None and (status.state, status.restarts) == ("finished", 1)
