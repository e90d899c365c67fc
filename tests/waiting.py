"""Wait for a run in another process, and find its ranks."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from tests.ranks import metrics


def rank_processes(launcher: subprocess.Popen[str]) -> list[int]:
    """The pids of the ranks that `maskwright train --nproc-per-node` has started, in rank order."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return [int(child) for child in children]


def wait_for_step(process: subprocess.Popen[str], run_dir: Path, step: int) -> None:
    """Wait until a step's metrics are written; fails when the run ends before."""
    while process.poll() is None:
        lines = metrics(run_dir)
        if lines and lines[-1]["step"] >= step:
            return
        time.sleep(0.05)
    output = process.communicate()[0]
    raise AssertionError(f"the run ended before step {step}:\n{output}")
