"""Which pages of a file the kernel holds: real reads counted, on a real disk."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_LIBC.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def drop_pages(paths: Iterable[Path]) -> None:
    """Have the kernel forget what it holds of files that nobody has mapped."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def resident_pages(path: Path) -> np.ndarray:
    """bool [pages]: which pages of a file are in memory (mincore(2) over a mapping that is never touched)."""
    size = path.stat().st_size
    held = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        address = _LIBC.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
        assert address != ctypes.c_void_p(-1).value, os.strerror(ctypes.get_errno())
        try:
            assert _LIBC.mincore(address, size, held.ctypes.data) == 0, os.strerror(ctypes.get_errno())
        finally:
            _LIBC.munmap(address, size)
    finally:
        os.close(descriptor)
    return (held & 1).astype(bool)


def drops_pages(folder: Path) -> bool:
    """Whether files in this folder are on a disk, so that dropped pages are gone; on tmpfs they are the file."""
    probe = folder / "page-cache-probe"
    try:
        probe.write_bytes(os.urandom(16 * mmap.PAGESIZE))
        drop_pages([probe])
        return not resident_pages(probe).any()
    finally:
        probe.unlink(missing_ok=True)
