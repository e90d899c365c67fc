"""Requests to stop: USR1 (the scheduler's early warning), TERM, HUP (the terminal has gone), Ctrl-C, the job's end.

A handler only sets a flag; ranks look at it at a step boundary and agree on one step to save and stop at.
A second Ctrl-C stops at once.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_HANG_UP = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)  # nohup has it ignored
STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, *_HANG_UP, signal.SIGINT)

JOB_END = "SLURM_JOB_END_TIME"
"""When SLURM will end the job, seconds since 1970. Newer SLURM sets it; for others slurm/train.sbatch does."""


class StopRequest:
    """What has been asked for: the name of the first signal received, or None."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self.due_at: float | None = None
        """Stop without a signal from then on, seconds since 1970: signals get lost."""

    @property
    def received(self) -> bool:
        if self.signal_name is None and self.due_at is not None and time.time() >= self.due_at:
            self.signal_name = "the approaching end of the job's time"
        return self.signal_name is not None

    @property
    def reason(self) -> str:
        """Why all ranks stop, as this one knows it."""
        return self.signal_name or "a signal to another rank"

    def handle(self, number: int, _frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_name = self.signal_name or signal.Signals(number).name


def hold_stop_signals() -> None:
    """Keep all but Ctrl-C pending until training, or the launcher, has its handlers.

    A job that is preempted while torch is still being imported then saves at its first step and requeues, where
    the default action would end it at once. After training, when the handlers are gone, a late one is ignored: it
    must not turn exit code 75 into a death by signal. Ctrl-C ends at once what has nothing to save yet.
    """
    held = [number for number in STOP_SIGNALS if number != signal.SIGINT]
    signal.pthread_sigmask(signal.SIG_BLOCK, held)
    for number in held:
        signal.signal(number, signal.SIG_IGN)  # Linux keeps a blocked signal pending even so


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Install the handlers; the previous ones come back at the end.

    Signals are held back while the process starts: they are let through here, when they can be handled.
    """
    request = StopRequest()
    previous = {number: signal.signal(number, request.handle) for number in STOP_SIGNALS}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def time_to_stop(lead_seconds: float) -> float | None:
    """Say when to stop by oneself, to leave a SLURM job so many seconds; seconds since 1970, None without a time limit.

    A job that has less than twice as long to live goes on for half of that: one that stopped at its start would be
    requeued for nothing.
    """
    end, now = os.environ.get(JOB_END, ""), time.time()
    if not end.isdecimal() or int(end) <= now:
        return None
    return int(end) - min(lead_seconds, (int(end) - now) / 2)


def ignore_stop_signals() -> None:
    """Ignore stop signals, in loader workers: they end with their rank, never by a signal that is meant for it."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
