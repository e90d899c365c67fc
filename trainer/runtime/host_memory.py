"""Memory of the host: how much processes may still take, and that what a step frees is kept for the next one."""

from __future__ import annotations

import ctypes
from pathlib import Path

import psutil

_CGROUPS = Path("/sys/fs/cgroup")
# malloc.h of glibc
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, instead of giving it back to the kernel; CPU training only.

    glibc maps each block above 32 MiB anew and unmaps it when it is freed, so that the kernel clears the logits and
    activations of every step page by page: a third of a step's CPU time (docs/performance.md). Here they come from
    the heap, one for all threads, which never shrinks. The process's peak is what it holds from then on; other C
    libraries are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_ARENA_MAX, 1)):
            mallopt(option, value)


def available_bytes(own_groups: Path = Path("/proc/self/cgroup"), root: Path = _CGROUPS) -> int:
    """Count what is free or can be reclaimed, within the limits of this process' control groups (version 2), if any.

    A job of a scheduler or a container often has less than its machine.
    """
    available = psutil.virtual_memory().available
    try:
        lines = own_groups.read_text().splitlines()
    except OSError:
        return available
    path = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), None)
    if path is None:
        return available
    group = root / path
    for folder in (group, *group.parents):
        room = _room(folder)
        available = available if room is None else min(available, room)
        if folder == root:
            break
    return max(0, available)


def _room(group: Path) -> int | None:
    """Count the bytes left below the limit of one group; None where it has none. File pages can be reclaimed."""
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return None if limit == "max" else int(limit) - used + int(statistics.get("inactive_file", 0))
