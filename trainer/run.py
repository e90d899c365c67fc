"""A run on one rank, opened: what all of its parts share. Only the files at the root of trainer/ are handed one."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TextIO

from trainer.config import Config, run_folder
from trainer.errors import HangError, UserError
from trainer.liveness.activity import Activity
from trainer.liveness.watch import watched
from trainer.runtime import distributed
from trainer.runtime.distributed import World
from trainer.runtime.logs import make_log, rank_log
from trainer.runtime.process import node_name
from trainer.runtime.run_lock import RunLock, held
from trainer.runtime.signals import StopRequest, time_to_stop
from trainer.tracking.console import TrainingConsole
from trainer.tracking.status import StatusWriter, change_status


@dataclass
class Run:
    """What is asked for, and this rank's hands on it.

    Attributes:
        config: as it was given; the inputs have the resolved one.
        resume: auto, must, never, or the path of a checkpoint.
        is_dry: one real step of each phase, of which nothing is kept.
        folder: the run folder.
        lock: of the folder, held.
        console: silent on ranks other than 0.
        status: writes nothing on ranks other than 0, nor of a dry run.
        activity: told what this rank is doing.
    """

    config: Config
    world: World
    resume: str
    is_dry: bool
    stop: StopRequest
    folder: Path
    lock: RunLock
    console: TrainingConsole
    status: StatusWriter
    activity: Activity

    def say(self, line: str) -> None:
        """Print a line, on rank 0."""
        self.console.say(line)


@contextmanager
def opened(
    config: Config, world: World, resume: str, is_dry: bool, stop: StopRequest, give_up: Callable[[HangError], None]
) -> Iterator[Run]:
    """Open a run on all ranks: lock, logs, status, signs of life.

    Args:
        give_up: called in a thread when the run is stuck; it reports the error, and ends the process.

    Raises:
        UserError: on every rank, when another job has the folder, or it cannot be written.
    """
    folder = run_folder(config)
    with ExitStack() as stack:
        lock = stack.enter_context(_lock(folder, world, is_dry))
        stream = stack.enter_context(_output(folder, world, is_dry))
        status = stack.enter_context(_status(folder, world, is_dry))
        activity = stack.enter_context(_watched(config, world, is_dry, status, give_up))
        if world.is_main and not is_dry:  # whose clock decides
            stop.due_at = time_to_stop(config.resilience.stop_before_end_seconds)
        console = TrainingConsole(stream, is_silent=not world.is_main)
        yield Run(config, world, resume, is_dry, stop, folder, lock, console, status, activity)


def _lock(folder: Path, world: World, is_dry: bool) -> AbstractContextManager[RunLock]:
    """Hold the run folder before anything is written there, logs included; a dry run writes nothing."""
    say = partial(print, flush=True)  # there is no other console yet
    return nullcontext(RunLock(folder, say)) if is_dry else held(world, folder, say)


@contextmanager
def _output(folder: Path, world: World, is_dry: bool) -> Iterator[TextIO]:
    """Write this rank's log in the run folder; a dry run leaves none there, so its log lies in a temporary one."""
    scratch = tempfile.TemporaryDirectory(prefix="maskwright-dry-run-") if is_dry else nullcontext(str(folder))
    with scratch as place:
        path, error = Path(), None
        try:
            path = make_log(Path(place), world.rank)
        except UserError as caught:
            error = caught
        distributed.raise_on_all_ranks(world, error)
        with rank_log(path, world.rank) as stream:
            yield stream


@contextmanager
def _status(folder: Path, world: World, is_dry: bool) -> Iterator[StatusWriter]:
    """Keep RUN/status.json, on rank 0; every rank calls it."""
    nodes = list(dict.fromkeys(distributed.all_gather(world, node_name())))
    status = StatusWriter(folder if world.is_main and not is_dry else None, nodes, world.size)
    with status.until_the_end():
        yield status


@contextmanager
def _watched(
    config: Config, world: World, is_dry: bool, status: StatusWriter, give_up: Callable[[HangError], None]
) -> Iterator[Activity]:
    """Yield this rank's activity, with heartbeats and a watchdog; a dry run leaves no files, and is not watched."""
    activity = Activity(on_enter=status.entered)
    if is_dry:
        yield activity
        return
    folder = run_folder(config)

    def end(error: HangError, is_first: bool) -> None:
        if is_first:  # rank 0 may be the one that is stuck
            change_status(folder, state="failed", reason=error.problem, eta_seconds=None)
        give_up(error)

    with watched(folder, world.rank, world.size, activity, config.watchdog, end):
        yield activity
