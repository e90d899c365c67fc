"""Run `maskwright` in tests as a user does: a process of its own, with the exit code, stdout and stderr it has."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.forked import become, take_place
from tests.ranks import FORK_SERVER, ON_GPUS
from tests.waiting import TIMEOUT_S, Started

READ_AT_IMPORT = ("CUDA_", "HF_", "PYTHONIO", "TRANSFORMERS_")
"""Variables that begin like this are read by libraries, or by Python, before a command begins."""


def maskwright(
    *arguments: str | Path, cwd: Path | None = None, fresh: bool = False, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run one command to its end.

    Args:
        fresh: in a new interpreter; else it is forked, see `tests.forked`.
        variables: for its environment.
    """
    words, environ = _words(arguments), _environ(variables)
    if _is_fresh(fresh, variables):
        command = [sys.executable, "-m", "launcher", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=environ, cwd=cwd)
    process = _Forked(words, environ, cwd or Path.cwd(), two_streams=True)
    stdout, stderr = process.communicate(timeout=TIMEOUT_S)
    return subprocess.CompletedProcess(words, process.wait(), stdout, stderr)


def start_maskwright(*arguments: str | Path, fresh: bool = False, **variables: str) -> Started:
    """Start one command, stdout and stderr in one stream. The arguments are those of `maskwright`."""
    words, environ = _words(arguments), _environ(variables)
    if _is_fresh(fresh, variables):
        command = [sys.executable, "-m", "launcher", *words]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ)
    return _Forked(words, environ, Path.cwd(), two_streams=False)


def start_maskwright_into(stdout: Path, stderr: Path, *arguments: str | Path, **variables: str) -> Started:
    """Start one command whose streams go where the caller says: a device, a terminal, a named pipe, a file."""
    return _Forked(_words(arguments), _environ(variables), Path.cwd(), two_streams=True, streams=(stdout, stderr))


class _Forked:
    """A command that the fork server has started; what it prints goes into files."""

    def __init__(
        self,
        words: list[str],
        environ: dict[str, str],
        cwd: Path,
        two_streams: bool,
        streams: tuple[Path, Path] | None = None,
    ) -> None:
        self._words = words
        self._scratch = tempfile.TemporaryDirectory(prefix="maskwright-test-")
        folder = Path(self._scratch.name)
        self._stdout, self._stderr = streams or (
            folder / "stdout",
            folder / "stderr" if two_streams else folder / "stdout",
        )
        self._process = FORK_SERVER.Process(target=_do_command, args=(words, environ, cwd, self._stdout, self._stderr))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._words, timeout or 0, self._stdout.read_bytes())
        return self._process.exitcode

    def communicate(self, input: None = None, timeout: float | None = None) -> tuple[str, str | None]:
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        return self._stdout.read_text(), self._stderr.read_text() if self._stderr != self._stdout else None

    def send_signal(self, number: int, /) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _do_command(words: list[str], environ: dict[str, str], cwd: Path, stdout: Path, stderr: Path) -> None:
    """Runs in the forked process."""
    os.chdir(cwd)
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    become(["launcher", *words], environ)


def call_forked(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process as that of a command, whose imports are behind it, and return what it returns.

    Programs of maskwright that it starts are forked from it in turn. Function, arguments and result are pickled.
    """
    ours, theirs = FORK_SERVER.Pipe(duplex=False)
    process = FORK_SERVER.Process(target=_call, args=(theirs, function, arguments, dict(os.environ)))
    process.start()
    theirs.close()
    try:
        error, result = ours.recv()
    except EOFError:
        process.join()
        raise AssertionError(f"it ended with exit code {process.exitcode} and without a result") from None
    process.join()
    if error is not None:
        raise error
    return result


def _call(result: Any, function: Callable[..., Any], arguments: tuple[Any, ...], environ: dict[str, str]) -> None:
    """Runs in the forked process."""
    take_place(environ)
    try:
        result.send((None, function(*arguments)))
    except Exception as error:
        result.send((error, None))


def _words(arguments: tuple[str | Path, ...]) -> list[str]:
    return [str(argument) for argument in arguments]


def _environ(variables: dict[str, str]) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **variables}


def _is_fresh(asked: bool, variables: dict[str, str]) -> bool:
    # CUDA cannot be used after a fork.
    return (
        asked
        or ON_GPUS
        or any(name.startswith(READ_AT_IMPORT) and os.environ.get(name) != value for name, value in variables.items())
    )


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
