"""How much memory the processes of this machine may still take."""

from __future__ import annotations

from pathlib import Path

import psutil

_CGROUPS = Path("/sys/fs/cgroup")


def available_bytes(own_groups: Path = Path("/proc/self/cgroup"), root: Path = _CGROUPS) -> int:
    """What is free or can be reclaimed, within the limits of this process' control groups (version 2), if any.

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
    """Bytes left below the limit of one group; None where it has none. File pages can be reclaimed."""
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return None if limit == "max" else int(limit) - used + int(statistics.get("inactive_file", 0))
