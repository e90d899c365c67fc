"""One rank under watch: its heartbeats, and the watchdog over its activity."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.config import WatchdogConfig
from trainer.errors import HangError
from trainer.liveness.activity import Activity
from trainer.liveness.heartbeat import HeartbeatWriter, remove_others
from trainer.liveness.watchdog import Limits, Watchdog


@contextmanager
def watched(
    run_dir: Path,
    rank: int,
    world_size: int,
    activity: Activity,
    settings: WatchdogConfig,
    give_up: Callable[[HangError, bool], None],
) -> Iterator[None]:
    """Watch this rank; `give_up` as in Watchdog."""
    if rank == 0:
        remove_others(run_dir, world_size)
    heartbeats = HeartbeatWriter(run_dir, rank, world_size, activity)
    watchdog = Watchdog(run_dir, rank, world_size, activity, Limits.of(settings), give_up)
    try:
        yield
    finally:
        watchdog.close()
        activity.end()
        heartbeats.close()
