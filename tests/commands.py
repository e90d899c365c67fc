"""Run `maskwright` in tests as a user does: a process of its own, with the exit code, stdout and stderr it has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.waiting import TIMEOUT_S


def maskwright(*arguments: str | Path, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run one command to its end."""
    command = [sys.executable, "-m", "launcher", *map(str, arguments)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=environ, cwd=cwd)


def start_maskwright(*arguments: str | Path, **variables: str) -> subprocess.Popen[str]:
    """Start one command, stdout and stderr in one stream."""
    command = [sys.executable, "-m", "launcher", *map(str, arguments)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ)


def assert_one_card(result: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """The exit code, one card (problem, where, remedy), no traceback, and the words in the card."""
    output = result.stdout + result.stderr
    assert result.returncode == code, output
    assert "Traceback" not in output, output
    titles = {2: "Please check: ", 3: "Damaged: "}
    lines = result.stderr.splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith(tuple(titles.values()))]
    assert len(starts) == 1, f"one card:\n{output}"
    card = lines[starts[0] :]
    assert card[0].startswith(titles[code]), output
    assert len(card) == 3 and card[1].startswith("  where:") and card[2].startswith("  remedy:"), output
    for word in words:
        assert word in "\n".join(card), f"{word!r} is not in\n{output}"
