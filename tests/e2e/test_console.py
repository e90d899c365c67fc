"""The console is a convenience: what is behind it does not change how a command ends."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from tests.commands import TIMEOUT_S, start_maskwright_into
from tests.ranks import losses, tiny_config, train, write_config
from trainer.errors import EXIT_FINISHED, EXIT_USER_MISTAKE

ROOT = Path(__file__).parents[2]


def shell(command: str, redirection: str) -> subprocess.CompletedProcess[str]:
    """Run a command of maskwright in bash; the exit code is its own."""
    line = f"{shlex.quote(sys.executable)} -m launcher {command} {redirection}; exit ${{PIPESTATUS[0]}}"
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, timeout=TIMEOUT_S, env=environ, cwd=ROOT
    )


def test_a_run_goes_on_without_its_reader_and_without_a_console(workspace: Path, tmp_path: Path) -> None:
    run_dir, pipe, full = tmp_path / "run", tmp_path / "pipe", Path("/dev/full")
    command = ("train", write_config(tiny_config(workspace, run_dir), tmp_path / "config.yaml"))
    os.mkfifo(pipe)
    process = start_maskwright_into(pipe, tmp_path / "stderr", *command, "--nproc-per-node", "2")
    with open(pipe) as reader:
        assert reader.readline()
    assert (process.wait(TIMEOUT_S), (tmp_path / "stderr").read_text()) == (EXIT_FINISHED, "")
    log = (run_dir / "logs" / "rank-00000.log").read_text()
    assert log.count("the console cannot be written (Broken pipe); the run goes on without it") == 1
    assert len(losses(run_dir)) == 20
    process = start_maskwright_into(full, full, *command, "--resume", "never")
    assert process.wait(TIMEOUT_S) == EXIT_FINISHED and len(losses(run_dir)) == 20
    closed = shell(" ".join(map(str, command)), "<&- >&- 2>&-")
    assert closed.returncode == 0, "a finished run"


def test_results_that_did_not_arrive_are_said_and_a_reader_that_left_is_not(workspace: Path, tmp_path: Path) -> None:
    assert train(tiny_config(workspace, tmp_path / "run", train={"steps": 1})) == EXIT_FINISHED
    command = f"status {tmp_path / 'run'}"
    full = shell(command, ">/dev/full")
    assert full.returncode == EXIT_USER_MISTAKE
    assert full.stderr.startswith("Please check: The output could not be written: No space left on device.\n")
    left = shell(command, "| true")
    assert (left.returncode, left.stderr) == (0, "")
