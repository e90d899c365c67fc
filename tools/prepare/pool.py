"""Worker processes that take units until all are done."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from threading import Event
from typing import Any

from tools.prepare.plan import Unit
from tools.prepare.worker import WorkSettings, work
from trainer.errors import MaskwrightError

TICK_SECONDS = 0.5


def run_units(
    units: Sequence[tuple[Unit, str]],
    settings: WorkSettings,
    workers: int,
    on_progress: Callable[[dict[int, tuple[int, int]]], None],
    cancel: Event | None = None,
) -> None:
    """Write all units in `workers` processes.

    Args:
        units: each with its identity.
        on_progress: called about twice a second with {unit number: (bytes read, tokens written)}.
        cancel: when it is set, the workers are ended.

    Raises:
        KeyboardInterrupt: when cancelled.
        MaskwrightError: what a worker raised, unchanged, or when a worker was killed.
        Exception: anything else that a worker raised, with its traceback as a note.
    """
    context: Any = worker_context(work.__module__)
    waiting = list(reversed(units))
    processes: dict[Connection, Any] = {}
    current: dict[Connection, Unit] = {}
    progress: dict[int, tuple[int, int]] = {}

    def give(connection: Connection) -> None:
        unit, identity = waiting.pop()
        current[connection] = unit
        connection.send((unit, identity))

    try:
        for number in range(min(workers, len(units))):
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(theirs, settings), name=f"prepare-{number}", daemon=True)
            process.start()
            theirs.close()
            processes[ours] = process
            give(ours)
        busy = set(processes)
        while busy:
            for connection in wait(list(busy), TICK_SECONDS):
                assert isinstance(connection, Connection)
                kind, value = _receive(connection, processes[connection], current[connection])
                if kind == "progress":
                    progress[value[0]] = value[1:]
                elif kind == "failed":
                    raise value
                elif waiting:
                    give(connection)
                else:
                    connection.send(None)
                    busy.remove(connection)
            on_progress(progress)
            if cancel is not None and cancel.is_set():
                raise KeyboardInterrupt
    finally:
        _end(list(processes.values()))


def worker_context(module: str) -> BaseContext:
    """Have workers forked from one process that has imported a module, which has what they run.

    A forked child of this process, which may have torch's or tokenizers' threads, could hang on a lock that it
    inherited. New interpreters would each read the same thousand files, at once, on a cluster from one file system.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    try:
        forkserver.ensure_running()
    except OSError:  # its socket lies in TMPDIR, whose path may be longer than a socket's may be
        return multiprocessing.get_context("spawn")
    return context


def _receive(connection: Connection, process: Any, unit: Unit) -> tuple[str, Any]:
    try:
        return connection.recv()
    except (EOFError, ConnectionResetError, pickle.UnpicklingError):
        process.join(5)
        code = process.exitcode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
        raise MaskwrightError(
            f"A worker process {how}.",
            where=f"{process.name}, at {unit.describe()}",
            remedy="If the machine ran out of memory, use fewer --workers. Run the same command again to continue.",
        ) from None


def _end(processes: list[Any]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(5)
        if process.is_alive():
            process.kill()
            process.join()
