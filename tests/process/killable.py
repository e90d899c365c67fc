"""Functions run in processes that a test can kill, together with the workers they have started."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

from tests.forked import fork_workers
from tests.ranks import FORK_SERVER
from tests.waiting import TIMEOUT_S


class Killable:
    """`function(*arguments)` in a process group of its own; a context manager that leaves nothing running."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._process = FORK_SERVER.Process(target=_lead_group, args=(function, arguments))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def __enter__(self) -> Killable:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> bool:
        """SIGKILL the whole group; returns whether it was still running."""
        running = self._process.is_alive()
        if running:
            os.killpg(self.pid, signal.SIGKILL)
        self._process.join(TIMEOUT_S)
        return running

    def wait(self) -> int:
        """Wait for the end; returns the exit code, negative for a signal."""
        self._process.join(TIMEOUT_S)
        assert self._process.exitcode is not None, "still running"
        return self._process.exitcode

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds or the function has ended."""
        deadline = time.monotonic() + TIMEOUT_S
        while self._process.is_alive() and not condition():
            assert time.monotonic() < deadline, "the condition never held"
            time.sleep(0.002)


def _lead_group(function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.setsid()
    fork_workers()
    function(*arguments)
