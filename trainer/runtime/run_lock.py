"""One job a run folder: a second one is refused, and the lock of a dead one is taken over.

Two files. `.lock` stays, is empty, and carries a record lock (`fcntl`), which ends with its process, however that ends;
network file systems know record locks, but some have none, or only within a machine. `lock.json` says who holds the run
folder, and its time is renewed while the job lives: a sign of life that any file system can carry.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from trainer.errors import MaskwrightError, UserError, cannot_write
from trainer.runtime import distributed
from trainer.runtime.distributed import World
from trainer.runtime.files import create_synced, sync_folder, unique_name, unique_token, write_synced
from trainer.runtime.process import has_process, job_id, restart_count
from trainer.runtime.record_lock import RecordLock, try_record_lock
from trainer.runtime.typed_json import Count, Pid, Seconds, as_type

logger = logging.getLogger(__name__)
GUARD, RECORD = ".lock", "lock.json"
BEAT_S = 10.0
"""Seconds between two signs of life."""
SILENCE_S = 120.0
"""A holder on another machine that gives no sign for so long is dead. Twelve beats: file systems stall, too."""
WATCH_S = 30.0
"""A record as old as that is watched for so long all the same: machines' clocks may differ."""
_POLL_S = 0.5
_SETTLE_S = 1.0


@dataclass(frozen=True)
class Holder:
    """A job that holds a run folder, by its rank 0.

    Attributes:
        token: of this taking of the lock.
        boot: the kernel it runs under, by its boot id; with `namespace`, where its pid means something.
        ticks: when its process started, in clock ticks since boot: a pid is used again.
        since: seconds since 1970.
        slurm_job: cluster and job id, empty outside SLURM; the id is kept over a requeue, which raises `restarts`.
        record_lock: whether it has the record lock.
    """

    token: str
    host: str
    boot: str
    namespace: str
    pid: Pid
    ticks: Count
    since: Seconds
    slurm_job: str
    restarts: Count
    record_lock: bool

    def __str__(self) -> str:
        job = f"SLURM job {self.slurm_job.rpartition('/')[2]}, " if self.slurm_job else ""
        since = datetime.fromtimestamp(self.since).strftime("%Y-%m-%d %H:%M:%S")
        return f"{job}process {self.pid} on {self.host}, since {since}"


class RunLock:
    """The lock of a run folder as a rank sees it; only rank 0 of a job that writes there has it.

    Attributes:
        notes: what to tell the user.
    """

    def __init__(self, run_dir: Path, say: Callable[[str], None]) -> None:
        self.notes: list[str] = []
        self._run_dir, self._say = run_dir, say
        self._record = run_dir / RECORD
        self._guard = -1
        self._holder: Holder | None = None
        self._taken_over = ""
        self._last_beat = 0.0
        self._ended = threading.Event()

    def take(self) -> None:
        """Take the lock.

        Raises:
            UserError: when another job has it, or the folder cannot be written.
        """
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            self._guard = self._open_guard()
            guard = try_record_lock(self._guard)
            self._holder = _this_process(record_lock=guard is RecordLock.OURS)
            while not self._try(guard):
                pass
            self._last_beat = _clock()
        except OSError as error:
            self.release()
            raise cannot_write(Path(error.filename or self._run_dir), self._run_dir, error) from None
        except BaseException:
            self.release()
            raise
        threading.Thread(target=self._beat, name="run-lock", daemon=True).start()

    def lost(self) -> UserError | None:
        """Say why this job may no longer write in the run folder: another one has taken it over."""
        if self._holder is not None and not self._taken_over:
            try:
                record = _read(self._record)
                gone = record is None and not self._record.exists()
            except OSError:  # the file system does not answer: nothing is known
                return None
            if record is not None and record.token != self._holder.token:
                self._taken_over = str(record)
            elif gone and _clock() - self._last_beat > SILENCE_S:
                self._taken_over = "one that has ended since"
        if not self._taken_over:
            return None
        return UserError(
            f"Another job has taken over this run, while this one gave no sign of life: {self._taken_over}.",
            where=f"run.dir={self._run_dir}",
            remedy="Nothing to do if the other one is meant to go on: this one has not touched its checkpoints.",
        )

    def release(self) -> None:
        """Give the lock back."""
        self._ended.set()
        with contextlib.suppress(OSError):
            held = _read(self._record)
            if held is not None and self._holder is not None and held.token == self._holder.token:
                self._record.unlink()
        if self._guard >= 0:
            os.close(self._guard)
            self._guard = -1

    def _try(self, guard: RecordLock) -> bool:
        """Write the record, if nobody else's stands there; False: look again."""
        assert self._holder is not None
        content = json.dumps(asdict(self._holder), indent=1).encode()
        other = self._holder_behind_the_guard() if guard is RecordLock.THEIRS else _read(self._record)
        if other is None:
            if guard is RecordLock.THEIRS:
                raise self._refusal("a process that has locked it and left no record")
            if not self._record.exists():
                return create_synced(self._record, content)
        death = self._death_of(other, guard) if other is not None else "its record cannot be read"
        if death is None:
            return False  # it has let go meanwhile
        if not self._replace(other, content):
            return False
        if guard is not RecordLock.OURS or (other is not None and other.boot != self._holder.boot):
            time.sleep(_SETTLE_S)  # two may have come to this line, where locks do not reach: the later one has it
            winner = _read(self._record)
            if winner is None or winner.token != self._holder.token:
                raise self._refusal(str(winner))
        self.notes.append(f"took over the run folder from {other or 'an earlier job'}: {death}")
        return True

    def _replace(self, other: Holder | None, content: bytes) -> bool:
        """Put our record in the place of a dead one; False when it is there no more: another job was faster."""
        temporary = unique_name(self._record)
        try:
            write_synced(temporary, content)
            now = _read(self._record)  # as late as can be
            if (now and now.token) != (other and other.token):
                return False
            os.replace(temporary, self._record)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(self._run_dir)
        return True

    def _holder_behind_the_guard(self) -> Holder | None:
        """Read who has the record lock. It writes its record just after the lock; a dead one's may lie there."""
        for _ in range(4):
            other = _read(self._record)
            if other is not None and (self._is_requeue_of(other) or self._is_running(other) is not False):
                break
            time.sleep(_POLL_S)
        return _read(self._record)

    def _is_running(self, other: Holder) -> bool | None:
        """Tell whether the process is there; None where its pid means nothing: on another machine or in a container."""
        mine = self._holder
        assert mine is not None
        if (other.boot, other.namespace) != (mine.boot, mine.namespace):
            return None
        return _is_running(other.pid, other.ticks)

    def _death_of(self, other: Holder, guard: RecordLock) -> str | None:
        """Say how it is known that a holder is dead; None when it has let go while we looked.

        Raises:
            UserError: when it is alive.
        """
        mine = self._holder
        assert mine is not None
        if self._is_requeue_of(other):
            return f"its SLURM job has been requeued since, and is this one (restart {mine.restarts})"
        if guard is RecordLock.THEIRS:
            raise self._refusal(str(other))
        running = self._is_running(other)
        if running is not None:
            if running:
                raise self._refusal(str(other))
            return "its process is gone"
        if other.boot == mine.boot and other.record_lock and guard is RecordLock.OURS:
            return "it has let go of its lock"
        return self._watch(other)

    def _is_requeue_of(self, other: Holder) -> bool:
        mine = self._holder
        return mine is not None and other.slurm_job == mine.slurm_job != "" and mine.restarts > other.restarts

    def _watch(self, other: Holder) -> str | None:
        """Wait for a sign of life from another machine, or for the end of its patience; as _death_of.

        The record's age is by the file system's clock. It may be wrong where clients set times by their own clocks, so
        it only shortens the wait.
        """
        start, beat = time.monotonic(), _time_of(self._record)
        last_heard = max(0.0, self._now() - beat)
        self._say(
            f"the run folder is locked by {other}; its last sign of life is {last_heard:.0f} s old. "
            f"Waiting for another, {max(WATCH_S, SILENCE_S - last_heard):.0f} s at most"
        )
        while True:
            time.sleep(_POLL_S)
            watched = time.monotonic() - start
            now = _read(self._record)
            if now is None and not self._record.exists():
                return None
            if now is None or now.token != other.token or _time_of(self._record) != beat:
                raise self._refusal(str(now or other))
            silence = last_heard + watched
            if watched >= SILENCE_S or (watched >= WATCH_S and silence >= SILENCE_S):
                return f"no sign of life for {silence:.0f} s"

    def _now(self) -> float:
        """Read the file system's clock, in seconds: the time of a file that is written now."""
        probe = unique_name(self._record)
        try:
            probe.write_bytes(b"0")
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _refusal(self, who: str) -> UserError:
        return UserError(
            f"Another job trains in this run folder: {who}.",
            where=f"run.dir={self._run_dir}",
            remedy=f"Wait until it has ended, or give another run.dir. If you know that it is dead, remove {GUARD} and "
            f"{RECORD} there.",
        )

    def _open_guard(self) -> int:
        """Open the file that is locked; what is there in its place is never removed, somebody may rely on it."""
        path = self._run_dir / GUARD
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            if error.errno not in (errno.EISDIR, errno.ELOOP, errno.ENXIO):
                raise
            raise UserError(
                f"{path} is no file that can be locked: {error.strerror}.",
                where=f"run.dir={self._run_dir}",
                remedy="If no job trains in this run folder, remove it: the next start makes a new one.",
            ) from None

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            if (lost := self.lost()) is not None:
                logger.error("%s It ends at its next save", lost.problem)
                return
            try:
                os.utime(self._record)
            except FileNotFoundError:
                self._write_again()
            except OSError as error:
                logger.info("the run folder's lock was not renewed: %s", error)
                continue
            self._last_beat = _clock()

    def _write_again(self) -> None:
        """Write the record again: somebody has removed that of a job that is alive."""
        if self._holder is not None and not self._ended.is_set():
            with contextlib.suppress(OSError):
                create_synced(self._record, json.dumps(asdict(self._holder), indent=1).encode())


@contextlib.contextmanager
def held(world: World, run_dir: Path, say: Callable[[str], None]) -> Iterator[RunLock]:
    """Hold a run folder for this job: rank 0 takes the lock, and all hear of it.

    Args:
        say: gets a line when rank 0 has to wait.

    Raises:
        UserError: on every rank, when another job has it, or the folder cannot be written.
    """
    lock, error = RunLock(run_dir, say), None
    try:
        if world.is_main:
            try:
                lock.take()
            except MaskwrightError as caught:
                error = caught
        distributed.raise_on_all_ranks(world, error)
        yield lock
    finally:
        lock.release()


def _this_process(record_lock: bool) -> Holder:
    job = job_id()
    return Holder(
        token=unique_token(),
        host=socket.gethostname(),
        boot=_boot_id(),
        namespace=_pid_namespace(),
        pid=os.getpid(),
        ticks=_start_ticks(os.getpid()) or 0,
        since=time.time(),
        slurm_job=f"{os.environ.get('SLURM_CLUSTER_NAME', '')}/{job}" if job else "",
        restarts=restart_count(),
        record_lock=record_lock,
    )


def _clock() -> float:
    """Read the clock that goes on while the machine, too, is suspended, in seconds."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _read(path: Path) -> Holder | None:
    """Read the holder that a record names; None where there is none, or it cannot be understood.

    Raises:
        OSError: when it is there and cannot be read.
    """
    try:
        return as_type(Holder, json.loads(path.read_bytes()))
    except (FileNotFoundError, ValueError, RecursionError):
        return None


def _time_of(path: Path) -> float:
    """Read the time of a file, in seconds; opened, because network file systems then ask for its present state."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        return os.fstat(file.fileno()).st_mtime
    return 0.0


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _pid_namespace() -> str:
    return os.readlink("/proc/self/ns/pid")


def _is_running(pid: int, ticks: int) -> bool:
    """Tell whether the process that started at `ticks` is still there, and not only as a zombie."""
    if not has_process(pid):
        return False
    found = _start_ticks(pid)
    return found is None or found == ticks


def _start_ticks(pid: int) -> int | None:
    """Read when a process started, in clock ticks since boot (field 22 of its stat); None where that cannot be read.

    0 for a zombie, which is no time at which one starts.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return 0 if fields[0] in "ZX" else int(fields[19])
