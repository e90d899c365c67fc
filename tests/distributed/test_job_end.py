"""A SLURM job's time limit: the ranks stop before it by themselves, if no signal has come."""

from __future__ import annotations

import os
import time
from pathlib import Path

from tests.ranks import losses, run_ranks, tiny_config
from trainer.checkpoint.find import candidates
from trainer.checkpoint.manifest import MANIFEST
from trainer.config import Config
from trainer.errors import EXIT_STOPPED_AFTER_SAVING
from trainer.runtime.signals import JOB_END, time_to_stop
from trainer.tracking.status import read_status

LEFT_S = 20
"""Half of it is for the save, far more than that takes."""


def test_a_job_whose_signal_was_lost_saves_and_stops_before_its_end(workspace: Path, tmp_path: Path) -> None:
    endless = tiny_config(workspace, tmp_path / "run", train={"steps": 1_000_000})
    assert run_ranks(train_to_the_end_of_the_job, 2, endless, tmp_path / "end") == [EXIT_STOPPED_AFTER_SAVING] * 2
    end = int((tmp_path / "end").read_text())
    (found,) = candidates(tmp_path / "run")
    assert end - LEFT_S / 2 <= (found.folder / MANIFEST).stat().st_mtime < end
    assert found.step == len(losses(tmp_path / "run")) > 1, "trained, saved the last step, and lost none"
    status = read_status(tmp_path / "run")
    assert status is not None and status.state == "stopped"
    assert status.reason == "the approaching end of the job's time"


def train_to_the_end_of_the_job(config: Config, note: Path) -> int:
    """On each rank: that of the second step is near. The clock of rank 1 is of no account."""
    from trainer.loop import Loop
    from trainer.train import run

    os.environ[JOB_END] = str(int(time.time()) + 3600) if os.environ["RANK"] == "0" else "1"
    step_is_done = Loop._step_is_done

    def step_is_done_and_time_is_short(self: Loop) -> None:
        step_is_done(self)
        if self.state.step == 2 and self.world.is_main:
            assert self.stop.due_at is not None and not self.stop.received, "known from the start on"
            end = int(time.time()) + LEFT_S
            note.write_text(str(end))
            os.environ[JOB_END] = str(end)
            # The lead is longer than that: what is left is halved.
            self.stop.due_at = time_to_stop(config.resilience.stop_before_end_seconds)

    Loop._step_is_done = step_is_done_and_time_is_short  # type: ignore[method-assign]
    return run(config)
