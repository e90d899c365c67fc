"""RUN/heartbeats/rank-00000.json: a sign of life of each rank, and where it stands. No torch.

A file is written in place, open to close: no rename, so that thousands of ranks cost a shared file system a hundred
small writes a second at most, and a reader on another node sees them (NFS shows what was written when it is opened
after a close).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from trainer.liveness.activity import Activity
from trainer.runtime.process import node_name
from trainer.runtime.side_files import read_record
from trainer.runtime.typed_json import Count, Integer, Number, Pid, Seconds

logger = logging.getLogger(__name__)
FOLDER = "heartbeats"
SHORTEST_INTERVAL_S = 1.0
WRITES_A_SECOND = 100
"""Of all ranks together: 4,096 of them write every 41 s."""
_SIZE = 512  # padded, so that a shorter text leaves nothing of a longer one behind it


@dataclass(frozen=True)
class Heartbeat:
    """A sign of life.

    Attributes:
        rank: whose.
        time: when it was given, seconds since 1970, by that machine's clock.
        beat: its number; it tells whether a rank lives without comparing clocks.
        interval_seconds: from one to the next.
        step: optimizer steps done.
        phase: prepare, start, data, step, evaluate, save or ended.
        position: signs of progress so far; the lowest of all ranks is the one that the others wait for.
        phase_seconds: since the last sign of progress.
        node: the machine, as the scheduler calls it.
        host: as it calls itself.
        pid: the process there.
    """

    rank: Count
    time: Seconds
    beat: Count
    interval_seconds: Seconds
    step: Count
    phase: str
    position: Integer
    phase_seconds: Number
    node: str
    host: str
    pid: Pid


def heartbeat_path(run_dir: Path, rank: int) -> Path:
    return run_dir / FOLDER / f"rank-{rank:05d}.json"


def interval_seconds(world_size: int) -> float:
    """Compute the time between two heartbeats of a rank."""
    return max(SHORTEST_INTERVAL_S, world_size / WRITES_A_SECOND)


def read_heartbeat(run_dir: Path, rank: int) -> Heartbeat | None:
    """Read the last one of a rank; None where there is none, or it is being written."""
    return read_record(heartbeat_path(run_dir, rank), Heartbeat)


def read_heartbeats(run_dir: Path, ranks: Iterable[int]) -> dict[int, Heartbeat]:
    """Read the last one of each of these ranks that has one."""
    found = {rank: read_heartbeat(run_dir, rank) for rank in ranks}
    return {rank: heartbeat for rank, heartbeat in found.items() if heartbeat is not None}


def remove_others(run_dir: Path, world_size: int) -> None:
    """Remove what ranks of an earlier, larger start left; the others' files are written over."""
    for path in (run_dir / FOLDER).glob("rank-*.json"):
        number = re.fullmatch(r"rank-(\d+)\.json", path.name)
        if number and int(number[1]) >= world_size:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


class HeartbeatWriter:
    """Writes this rank's heartbeats from a thread, until it is closed."""

    def __init__(self, run_dir: Path, rank: int, world_size: int, activity: Activity) -> None:
        self._path, self._rank, self._activity = heartbeat_path(run_dir, rank), rank, activity
        self._interval = interval_seconds(world_size)
        self._names = (node_name(), socket.gethostname(), os.getpid())
        self._beat, self._warned = 0, False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Give a last one, if the file system takes it at once: an end in order waits for nothing."""
        self._ended.set()
        self._thread.join(self._interval)

    def _run(self) -> None:
        while not self._ended.wait(self._interval if self._beat else 0.0):
            self._write()
        self._write()

    def _write(self) -> None:
        """Write one heartbeat; a disk that is full costs heartbeats, not the run."""
        self._beat += 1
        place = self._activity.place
        node, host, pid = self._names
        heartbeat = Heartbeat(
            rank=self._rank,
            time=time.time(),
            beat=self._beat,
            interval_seconds=self._interval,
            step=place.step,
            phase=place.phase,
            position=place.position,
            phase_seconds=round(time.monotonic() - place.since, 3),
            node=node,
            host=host,
            pid=pid,
        )
        try:
            self._path.parent.mkdir(exist_ok=True)
            afresh = os.O_TRUNC if self._beat == 1 else 0
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | afresh, 0o666)
            try:
                os.write(descriptor, json.dumps(asdict(heartbeat)).ljust(_SIZE - 1).encode() + b"\n")
            finally:
                os.close(descriptor)
        except OSError as error:
            if not self._warned:
                logger.warning("%s is not written: %s", self._path, error.strerror)
            self._warned = True
