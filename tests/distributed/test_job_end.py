"""A SLURM job's time limit: the ranks stop before it by themselves, if no signal has come."""

from __future__ import annotations

import os
import time
from pathlib import Path

from tests.ranks import losses, run_ranks, tiny_config
from trainer.checkpoint.find import candidates
from trainer.config import Config
from trainer.errors import EXIT_STOPPED_AFTER_SAVING
from trainer.tracking.status import read_status


def test_fault_16_a_job_whose_signal_was_lost_saves_and_stops_before_its_end(workspace: Path, tmp_path: Path) -> None:
    endless = tiny_config(workspace, tmp_path / "run", train={"steps": 1_000_000})
    end = str(int(time.time()) + 24)
    # The lead is longer than the job: what is left at the start is halved.
    assert run_ranks(train_until, 2, endless, end, timeout_s=60) == [EXIT_STOPPED_AFTER_SAVING] * 2
    assert time.time() < int(end)
    step = candidates(tmp_path / "run")[0].step
    assert step == len(losses(tmp_path / "run")) > 1, "trained, saved the last step, and lost none"
    status = read_status(tmp_path / "run")
    assert status is not None and status.state == "stopped"
    assert status.reason == "the approaching end of the job's time"


def train_until(config: Config, end: str) -> int:
    """On each rank; the clock of rank 1 is of no account."""
    from trainer.train import run

    os.environ["SLURM_JOB_END_TIME"] = end if os.environ["RANK"] == "0" else "1"
    return run(config)
