"""What this rank is doing, told by its main thread and read by the threads that watch it."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

PhaseName = Literal["prepare", "start", "data", "step", "evaluate", "save", "ended"]


@dataclass(frozen=True)
class Progress:
    """Where a rank stands.

    Attributes:
        phase: prepare (raw text), start (to the first step, and after a rollback), data (to the moment when all ranks
            have their batch), step, evaluate, save, ended.
        step: optimizer steps done.
        position: signs of progress so far. All ranks give the same ones in the same order, so the rank with the lowest
            position is the one that the others wait for.
        since: when it came here, by the monotonic clock, seconds.
    """

    phase: PhaseName
    step: int
    position: int
    since: float


class Activity:
    """The place of this rank.

    Args:
        on_enter: called by the main thread with the name of each phase that begins.
    """

    def __init__(self, on_enter: Callable[[PhaseName], None] | None = None) -> None:
        self.place = Progress("start", 0, 0, time.monotonic())  # replaced as a whole: other threads read it
        self.is_started = False
        """Whether the first step has been done, and nothing is new that has to be compiled."""
        self._compiled: set[Hashable] = set()
        self._on_enter = on_enter

    def enter(self, phase: PhaseName) -> None:
        """Begin a phase."""
        changes = phase != self.place.phase
        self._move(phase, self.place.step)
        if changes and self._on_enter is not None:
            self._on_enter(phase)

    def progress(self) -> None:
        """Note that the present phase is getting on; every rank says so at the same points."""
        self._move(self.place.phase, self.place.step)

    @contextmanager
    def within(self, phase: PhaseName) -> Iterator[None]:
        """Enter a phase, and then the one of before again."""
        before = self.place.phase
        self.enter(phase)
        yield
        self.enter(before)

    def at_step(self, step: int, is_started: bool = True) -> None:
        """Note that so many optimizer steps are done, by this start or, until it `is_started`, by those before."""
        self.is_started = is_started
        self._move(self.place.phase, step)

    def compiles(self, shape: Hashable) -> None:
        """Expect batches of this shape in a model that is compiled for each: the first takes as long as a start may."""
        if shape not in self._compiled:
            self._compiled.add(shape)
            self.is_started = False

    def end(self) -> None:
        """Note that this rank ends, in order or by an error that it tells."""
        self._move("ended", self.place.step)

    def _move(self, phase: PhaseName, step: int) -> None:
        self.place = Progress(phase, step, self.place.position + 1, time.monotonic())
