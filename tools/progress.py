"""Progress of long work: a bar on a terminal, a line every ten seconds off it."""

from __future__ import annotations

import time
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

LINE_SECONDS = 10.0


class StepProgress:
    """A context manager; `show` takes what is done so far. A total of 0 means that it is unknown."""

    def __init__(self, console: Console, label: str, total: int) -> None:
        self._console, self._label, self._total = console, label, total
        self._started = self._printed = time.monotonic()
        self._bar: Progress | None = None
        self._task: Any = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self._label, total=self._total or None, state="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return max(time.monotonic() - self._started, 1e-6)

    def show(self, done: int, state: str) -> None:
        """Show `done` of the total; `state` is what is said of it."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, state=state)
        elif time.monotonic() - self._printed >= LINE_SECONDS:
            left = ""
            if 0 < done < self._total:
                left = f", {_clock(self.seconds * (self._total - done) / done)} left"
            self._console.print(f"{self._label}: {state}{left}", highlight=False, soft_wrap=True)
            self._printed = time.monotonic()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
