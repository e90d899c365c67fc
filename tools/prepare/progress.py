"""Progress of a long read: a bar on a terminal, a line every ten seconds off it."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from tools.prepare.summary import human_bytes

LINE_SECONDS = 10.0


class ReadProgress:
    """A context manager; `update` takes totals. A total of 0 bytes means that it is unknown."""

    def __init__(self, console: Console, label: str, total_bytes: int) -> None:
        self._console, self._label, self._total = console, label, total_bytes
        self._started = self._printed = time.monotonic()
        self._bar: Progress | None = None
        self._task: Any = None

    def __enter__(self) -> ReadProgress:
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self._label, total=self._total or None, state="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, read_bytes: int, tokens: int | None = None) -> None:
        """`read_bytes` and `tokens` so far; tokens None shows bytes alone."""
        now = time.monotonic()
        seconds = max(now - self._started, 1e-6)
        state = human_bytes(read_bytes) + (f" of {human_bytes(self._total)}" if self._total else "")
        if tokens is not None:
            state += f", {tokens / 1e6:.1f} M tokens, {tokens / seconds / 1e6:.2f} M tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=read_bytes, state=state)
        elif now - self._printed >= LINE_SECONDS:
            left = ""
            if self._total and read_bytes:
                left = f", {_clock(seconds * max(0, self._total - read_bytes) / read_bytes)} left"
            self._console.print(f"{self._label}: {state}{left}", highlight=False, soft_wrap=True)
            self._printed = now


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
