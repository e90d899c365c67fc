"""Who may write in a work folder: one process all of it, or several tasks each its units.

Locks are record locks (`fcntl`): network file systems know them as well, one file has a byte for each unit, and they
end with the process, however that ends. Where a file system has none, two writers of a unit still cannot mix their
bytes, because temporary names are unique.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator, Sequence

from tools.prepare.job import Job
from tools.prepare.plan import Unit
from tools.prepare.summary import counted
from trainer.errors import UserError
from trainer.runtime.plain_text import listed

_JOB_BYTE = 0  # shared by tasks, or had alone
_FIRST_UNIT_BYTE = 1


@contextlib.contextmanager
def locked(job: Job) -> Iterator[None]:
    """Keep every other process out of the work folder, tasks too.

    Raises:
        UserError: when another process is at work.
    """
    with _lock_file(job) as file:
        if _lock(file, fcntl.LOCK_EX, _JOB_BYTE) is None:
            raise UserError(
                "Another prepare, or a task of one, is writing to this folder.",
                where=str(job.output),
                remedy="Wait until it has ended, or choose another --output.",
            )
        yield


@contextlib.contextmanager
def locked_units(job: Job, units: Sequence[Unit]) -> Iterator[bool]:
    """Keep other processes from writing these units, and from joining the job; other units stay free.

    Yields whether the file system has locks.

    Raises:
        UserError: when another process joins the job, or writes one of the units.
    """
    with _lock_file(job) as file:
        if (granted := _lock(file, fcntl.LOCK_SH, _JOB_BYTE)) is None:
            raise UserError(
                "A prepare without --task, or with --finalize, is at work in this folder.",
                where=str(job.output),
                remedy="Wait until it has ended; it does the work of all tasks.",
            )
        busy = [unit for unit in units if _lock(file, fcntl.LOCK_EX, _FIRST_UNIT_BYTE + unit.number) is None]
        if busy:
            raise UserError(
                f"Another process is writing {counted(len(busy), 'unit')} of this task: "
                f"{listed([str(unit.number) for unit in busy])}.",
                where=str(job.output),
                remedy="The same task runs twice, or with another number of tasks; wait for it, or end it.",
            )
        yield granted


@contextlib.contextmanager
def _lock_file(job: Job) -> Iterator[int]:
    job.work_folder.mkdir(exist_ok=True)  # another process may have ended the job and removed it
    file = os.open(job.work_folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        yield file
    finally:
        os.close(file)


def _lock(file: int, kind: int, byte: int) -> bool | None:
    """Try to lock a byte. True: locked; None: another process has it; False: the file system has no locks."""
    try:
        fcntl.lockf(file, kind | fcntl.LOCK_NB, 1, byte)
    except OSError as error:
        return None if error.errno in (errno.EACCES, errno.EAGAIN) else False
    return True
