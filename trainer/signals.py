"""Requests to stop: USR1 (the scheduler's early warning), TERM and Ctrl-C.

A handler only sets a flag; ranks look at it at a step boundary and agree on one step to save and stop at.
A second Ctrl-C stops at once.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """What has been asked for: the name of the first signal received, or None."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    @property
    def received(self) -> bool:
        return self.signal_name is not None

    @property
    def reason(self) -> str:
        """Why all ranks stop, as this one knows it."""
        return self.signal_name or "a signal to another rank"

    def handle(self, number: int, _frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_name = self.signal_name or signal.Signals(number).name


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Install the handlers; the previous ones come back at the end.

    The launcher holds signals back while the process starts: they are let through here, when they can be handled.
    """
    request = StopRequest()
    previous = {number: signal.signal(number, request.handle) for number in STOP_SIGNALS}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def ignore_stop_signals() -> None:
    """For loader workers: they end with their rank, never by a signal that is meant for it."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
