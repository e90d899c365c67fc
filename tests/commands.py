"""Run `maskwright` in tests as a user does: a process of its own, with the exit code, stdout and stderr it has."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.ranks import FORK_SERVER, ON_GPUS
from tests.waiting import TIMEOUT_S


def maskwright(*arguments: str | Path, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run one command to its end.

    Its process is forked from a server that has the imports behind it, which take longer than most commands. Who sets
    variables gets one that starts from nothing, since libraries read some of them as they are imported.
    """
    words = [str(argument) for argument in arguments]
    if variables or ON_GPUS:  # CUDA cannot be used after a fork
        command = [sys.executable, "-m", "launcher", *words]
        environ = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=environ, cwd=cwd)
    with tempfile.TemporaryDirectory(prefix="maskwright-test-") as scratch:
        stdout, stderr = Path(scratch, "stdout"), Path(scratch, "stderr")
        place = (cwd or Path.cwd(), dict(os.environ), stdout, stderr)
        process = FORK_SERVER.Process(target=_command, args=(words, *place))
        process.start()
        process.join(TIMEOUT_S)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(words, TIMEOUT_S, stdout.read_bytes(), stderr.read_bytes())
        return subprocess.CompletedProcess(words, process.exitcode, stdout.read_text(), stderr.read_text())


def _command(words: list[str], cwd: Path, environ: dict[str, str], stdout: Path, stderr: Path) -> None:
    """Runs in the forked process: take the place that a process of the shell has, and do the command."""
    from launcher.__main__ import main

    os.environ.clear()
    os.environ.update(environ)
    os.chdir(cwd)
    sys.stdin = open(os.devnull)
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", closefd=False, buffering=1, errors="backslashreplace")
    # A user's process forks its workers; here they would come from a fork server of their own.
    multiprocessing.set_start_method("fork", force=True)
    sys.argv = ["maskwright", *words]
    main()


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
