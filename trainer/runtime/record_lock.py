"""Locks of single bytes of a file, between processes and, on most network file systems, between machines."""

from __future__ import annotations

import errno
import fcntl
from enum import Enum, auto


class RecordLock(Enum):
    """What came of an attempt to lock."""

    OURS = auto()
    THEIRS = auto()
    """Another process has it."""
    UNSUPPORTED = auto()
    """The file system has no such locks."""


def try_record_lock(file: int, kind: int = fcntl.LOCK_EX, byte: int = 0) -> RecordLock:
    """Lock one byte of an open file, if that takes no waiting; the end of the process lets it go.

    Args:
        kind: fcntl.LOCK_EX or fcntl.LOCK_SH.
    """
    try:
        fcntl.lockf(file, kind | fcntl.LOCK_NB, 1, byte)
    except OSError as error:
        return RecordLock.THEIRS if error.errno in (errno.EACCES, errno.EAGAIN) else RecordLock.UNSUPPORTED
    return RecordLock.OURS
