"""Wait for what another process does: for a state, never for a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from trainer.tracking.jsonl import read_metrics

TIMEOUT_S = 600.0
"""Of one wait; only what hangs takes longer, on a machine with ten times the work that it has cores for too."""


class Started(Protocol):
    """What tests use of a process that was started, which may be a subprocess.Popen."""

    pid: int

    @property
    def returncode(self) -> int | None: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def communicate(self, input: None = None, timeout: float | None = None) -> tuple[str, str | None]: ...
    def send_signal(self, number: int, /) -> None: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...


def wait_for(condition: Callable[[], bool], what: str, poll_s: float = 0.02) -> None:
    """Wait until a condition holds.

    Args:
        what: is waited for, for the message when it does not come.
    """
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, f"{what}: waited for {TIMEOUT_S:g} s"
        time.sleep(poll_s)


def rank_processes(launcher: Started) -> list[int]:
    """The pids of the ranks that `maskwright train --nproc-per-node` has started, in rank order."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return [int(child) for child in children]


def wait_for_step(process: Started, run_dir: Path, step: int) -> None:
    """Wait until a step's metrics are written; fails when the run ends before."""

    def reached() -> bool:
        if process.poll() is not None:
            raise AssertionError(f"the run ended before step {step}:\n{process.communicate()[0]}")
        lines = read_metrics(run_dir / "metrics.jsonl")
        return bool(lines) and lines[-1]["step"] >= step

    wait_for(reached, f"step {step}")


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
