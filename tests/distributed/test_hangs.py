"""A rank that stands still ends the run with its name; one that is slow is named, and the run goes on."""

from __future__ import annotations

import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.commands import start_maskwright
from tests.faults import processes_with
from tests.forked import MARK
from tests.ranks import metrics, run_ranks, tiny_config, write_config
from tests.waiting import TIMEOUT_S, Started, rank_processes, wait_for, wait_for_step
from trainer.errors import EXIT_STOPPED_AFTER_SAVING, EXIT_UNEXPECTED
from trainer.tracking.status import Status, read_status

LIMIT_S = 12.0


@contextmanager
def started_run(workspace: Path, folder: Path, **watchdog: Any) -> Iterator[tuple[Started, str]]:
    """`maskwright train` on two ranks, at a step; with a mark that all its processes have in their environment."""
    sections: dict[str, Any] = {"train": {"steps": 100_000}, "watchdog": watchdog, "data": {"workers": 1}}
    config = write_config(tiny_config(workspace, folder / "run", **sections), folder / "config.yaml")
    mark = uuid.uuid4().hex
    process = start_maskwright("train", config, "--nproc-per-node", "2", **{MARK: mark})
    try:
        wait_for_step(process, folder / "run", 3)
        assert len(processes_with(mark)) >= 5, "the launcher, two ranks and a worker of each"
        yield process, mark
    finally:
        process.kill()
        process.wait()


def log_of(folder: Path, rank: int) -> str:
    return (folder / "run" / "logs" / f"rank-{rank:05d}.log").read_text(encoding="utf-8", errors="replace")


def status_of(folder: Path) -> Status:
    status = read_status(folder / "run")
    assert status is not None
    return status


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_is_named_the_others_end_with_stacks_and_nothing_is_left(
    stopped: int, workspace: Path, tmp_path: Path
) -> None:
    limits = {f"{phase}_minutes": LIMIT_S / 60 for phase in ("data", "step", "evaluate", "save")}
    with started_run(workspace, tmp_path, **limits) as (process, mark):
        pid = rank_processes(process)[stopped]
        os.kill(pid, signal.SIGSTOP)
        output = process.communicate(timeout=TIMEOUT_S)[0]
    assert process.returncode == EXIT_UNEXPECTED, "not 75: nothing has been saved"
    assert "Stuck: No progress in phase " in output
    assert f"Behind: rank {stopped} (node " in output
    assert f"process {pid}," in output and "gives no sign of life any more" in output
    assert "Traceback" not in output, "what the other rank meets is no cause"
    stacks = log_of(tmp_path, 1 - stopped)
    assert "all stacks:" in stacks and "most recent call first" in stacks
    assert "trainer/loop.py" in stacks, "of the main thread"
    assert not processes_with(mark)
    status = status_of(tmp_path)
    assert status.state == "failed"
    assert f"Behind: rank {stopped} (node " in status.reason


@contextmanager
def slowed(pid: int) -> Iterator[None]:
    """Let a process run for a tenth of the time."""
    ended = threading.Event()

    def pulse() -> None:
        while not ended.is_set():
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.18)
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.02)

    thread = threading.Thread(target=pulse)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_a_slow_rank_is_named_and_the_run_goes_on(workspace: Path, tmp_path: Path) -> None:
    with started_run(workspace, tmp_path, straggler_minutes=2.0 / 60) as (process, _):
        with slowed(rank_processes(process)[1]):
            wait_for(lambda: "rank 1 on " in log_of(tmp_path, 0), "a line about stragglers")
        step = metrics(tmp_path / "run")[-1]["step"]
        wait_for_step(process, tmp_path / "run", step + 10)
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=TIMEOUT_S)[0]
    assert process.returncode == EXIT_STOPPED_AFTER_SAVING
    lines = [line for line in output.splitlines() if line.startswith("stragglers of the last ")]
    named = next(line for line in lines if "rank 1 on " in line)
    assert "times the median in phase" in named
    assert "No progress" not in output
    assert (status_of(tmp_path).state, status_of(tmp_path).reason) == ("stopped", "SIGINT")


def waits_too_long(folder: Path, seconds: float) -> int:
    """Runs on each rank: rank 1 does not come to a reduction until rank 0 has given up."""
    from trainer.runtime import distributed

    world = distributed.start()
    distributed.all_reduce_sum(world, [1.0])
    distributed.set_timeouts(timedelta(seconds=seconds), timedelta(seconds=seconds))
    if world.rank == 1:
        wait_for((folder / "given-up").exists, "rank 0")
        return 0
    with pytest.raises(RuntimeError, match="Timed out"):
        distributed.all_reduce_sum(world, [1.0])
    (folder / "given-up").touch()
    return 7


def test_a_collective_ends_by_the_shorter_timeout_once_that_is_set(tmp_path: Path) -> None:
    assert run_ranks(waits_too_long, 2, tmp_path, 1.0) == [7, 0]


def exchanges_a_table() -> int:
    from trainer.runtime import distributed

    world = distributed.start()
    assert distributed.all_gather_floats(world, [world.rank + 0.5, 10.0]) == [[0.5, 10.0], [1.5, 10.0], [2.5, 10.0]]
    return 0


def test_a_table_has_a_row_of_each_rank() -> None:
    assert run_ranks(exchanges_a_table, 3) == [0, 0, 0]
