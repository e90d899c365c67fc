"""The watchdog of a rank: a phase without progress ends the run, with all stacks in the log and who is behind named.

It watches signs of progress, not durations: each batch of an evaluation is one, each micro-batch of a step, so long
work that gets on is never ended. Time in which the whole process stood still (a suspended job) does not count.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from trainer.config import WatchdogConfig
from trainer.errors import HangError
from trainer.liveness.activity import Activity, Progress
from trainer.liveness.heartbeat import Heartbeat, heartbeat_path, interval_seconds, read_heartbeats
from trainer.runtime.logs import log_path
from trainer.runtime.plain_text import listed

logger = logging.getLogger(__name__)
READERS = 16
"""Ranks that look for who is behind, spread over all: thousands that read thousands of files would take long."""
COLLECTIVE_MARGIN = timedelta(minutes=5)
UNLIMITED = timedelta(days=1)
"""Of a collective where a phase has no limit: torch has no value for "never"."""
_NAMED = 4
_READ_TIMEOUT_S = 60.0
_STDERR = 2  # the rank's log, by descriptor


@dataclass(frozen=True)
class Limits:
    """Seconds without a sign of progress that end a run, by phase; None: never."""

    start: float | None
    data: float | None
    step: float | None
    evaluate: float | None
    save: float | None

    @classmethod
    def of(cls, settings: WatchdogConfig) -> Limits:
        minutes = {name: getattr(settings, f"{name}_minutes") for name in cls.__dataclass_fields__}
        return cls(**{name: None if value is None else value * 60 for name, value in minutes.items()})

    def of_phase(self, phase: str, is_started: bool) -> float | None:
        """Find a phase's limit; until the first step is done, which may compile, that of a start if it is longer."""
        if phase in ("prepare", "ended"):
            return None
        limit = getattr(self, phase)
        if is_started or phase == "start":
            return limit
        return None if limit is None or self.start is None else max(limit, self.start)

    @property
    def of_start(self) -> timedelta:
        """How long a collective may take until the first step is done."""
        return _collective_timeout([self.start])

    @property
    def of_decisions(self) -> timedelta:
        """How long a collective over gloo may take from then on: ranks wait there for data and saves of others."""
        return _collective_timeout([self.data, self.step, self.evaluate, self.save])

    @property
    def of_gradients(self) -> timedelta:
        """How long a collective over NCCL may take from then on."""
        return _collective_timeout([self.step, self.evaluate])


def _collective_timeout(limits: list[float | None]) -> timedelta:
    """Choose a timeout above the watchdog's, which knows more to say: this is for the case that it is stuck itself."""
    given = [limit for limit in limits if limit is not None]
    return UNLIMITED if len(given) < len(limits) else timedelta(seconds=max(given)) + COLLECTIVE_MARGIN


class Watchdog:
    """Watches one rank from a thread, until it is closed.

    Args:
        give_up: called when a phase has made no progress for too long, with the error, and whether this rank is the
            first of those that know; it ends the process.
    """

    def __init__(
        self,
        run_dir: Path,
        rank: int,
        world_size: int,
        activity: Activity,
        limits: Limits,
        give_up: Callable[[HangError, bool], None],
    ) -> None:
        self._run_dir, self._rank, self._world_size = run_dir, rank, world_size
        self._activity, self._limits, self._give_up = activity, limits, give_up
        given = [value for value in vars(limits).values() if value is not None]
        self._poll = min(1.0, min(given, default=1.0) / 4)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ended.set()

    def _run(self) -> None:
        quiet, position, last = 0.0, -1, time.monotonic()
        while not self._ended.wait(self._poll):
            now = time.monotonic()
            elapsed, last = min(now - last, 2 * self._poll + 1.0), now
            place = self._activity.place
            quiet = quiet + elapsed if place.position == position else 0.0
            position = place.position
            limit = self._limits.of_phase(place.phase, self._activity.is_started)
            if limit is not None and quiet >= limit:
                self._judge(place, quiet)
                quiet, last = 0.0, time.monotonic()

    def _judge(self, place: Progress, quiet: float) -> None:
        """Dump the stacks, look for who is behind, and give up unless the phase has got on meanwhile."""
        logger.error("no progress in phase '%s' for %.0f s at step %d; all stacks:", place.phase, quiet, place.step)
        faulthandler.dump_traceback(_STDERR, all_threads=True)
        before, after = self._look_twice() if self._reads(self._rank) else ({}, {})
        if self._ended.is_set() or self._activity.place.position != place.position:
            logger.warning("phase '%s' goes on", place.phase)
            return
        found = find_behind(before, after, self._world_size)
        living = [rank for rank, beat in after.items() if self._reads(rank) and beat != before.get(rank)]
        is_first = self._rank == min(living, default=None)
        self._give_up(hang_error(place, quiet, found, self._run_dir, self._rank), is_first)

    def _reads(self, rank: int) -> bool:
        return rank % -(-self._world_size // READERS) == 0

    def _look_twice(self) -> tuple[dict[int, Heartbeat], dict[int, Heartbeat]]:
        """Read all heartbeats, and again when each living rank has given another one; empty if nothing can be read."""
        looks: list[dict[int, Heartbeat]] = []

        def look() -> None:
            looks.append(read_heartbeats(self._run_dir, range(self._world_size)))
            time.sleep(2 * interval_seconds(self._world_size) + 0.5)
            looks.append(read_heartbeats(self._run_dir, range(self._world_size)))

        thread = threading.Thread(target=look, name="watchdog-look", daemon=True)  # a file system may hang, too
        thread.start()
        thread.join(_READ_TIMEOUT_S + 2 * interval_seconds(self._world_size))
        return (looks[0], looks[1]) if len(looks) == 2 else ({}, {})


@dataclass(frozen=True)
class Behind:
    """A rank that the others wait for."""

    rank: int
    why: str


def find_behind(before: Mapping[int, Heartbeat], after: Mapping[int, Heartbeat], world_size: int) -> list[Behind]:
    """Find who the others wait for: silent ranks, else those that have not come as far; empty if none stands out.

    Args:
        before, after: the heartbeats of all ranks, with time for one more between the two looks.
    """
    if not after:
        return []
    silent = []
    for rank in range(world_size):
        beat = after.get(rank)
        if beat is None:
            silent.append(Behind(rank, f"rank {rank} (gave no sign of life at all)"))
        elif beat.phase == "ended":
            silent.append(Behind(rank, f"{_describe(beat)}, which has ended"))
        elif rank in before and before[rank].beat == beat.beat:
            silent.append(Behind(rank, f"{_describe(beat)}, which gives no sign of life any more"))
    if silent:
        return silent
    furthest = max(beat.position for beat in after.values())
    return [Behind(rank, _describe(beat)) for rank, beat in sorted(after.items()) if beat.position < furthest]


def _describe(beat: Heartbeat) -> str:
    return f"rank {beat.rank} (node {beat.node}, process {beat.pid}, phase {beat.phase}, step {beat.step})"


def hang_error(place: Progress, quiet: float, behind: list[Behind], run_dir: Path, rank: int) -> HangError:
    """Make the error for a phase that makes no progress."""
    names = listed([found.why for found in behind], _NAMED, "; ")
    who = f" Behind: {names}." if behind else " No rank is behind the others, as far as heartbeats tell."
    logs = [log_path(run_dir, found.rank) for found in behind[:1]] or [log_path(run_dir, rank)]
    key = f"watchdog.{place.phase}_minutes"
    return HangError(
        f"No progress in phase '{place.phase}' for {quiet:.0f} s, after step {place.step}.{who}",
        where=f"the stacks of rank {rank} are in {log_path(run_dir, rank)}; heartbeats in "
        f"{heartbeat_path(run_dir, rank).parent}",
        remedy=f"Look at {logs[0]} and at that machine, and leave it out if it is broken. If so long a time is right, "
        f"raise {key} (null: no limit). The same command resumes from the last checkpoint.",
    )


def end_at_once(error: HangError) -> None:
    """End a rank of which nobody collects a report: its main thread is stuck, perhaps in C, and cannot end it."""
    print(f"{error.title}: {error}", flush=True)
    os._exit(error.exit_code)
