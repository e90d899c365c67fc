"""What the cache of prepared text holds besides the data of a run: it grows by a copy with each change of a setting."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from tools.prepare.summary import counted, human_bytes
from trainer.data.manifest import MANIFEST, PREPARE_WORK_FOLDER, SPLITS
from trainer.runtime.plain_text import listed

CACHE_FOLDER = "text-cache"
"""Beside the run folder, unless `data.text.cache` says otherwise."""


def describe_unused(cache: Path, used: Collection[Path]) -> str | None:
    """Describe the preparations of other texts or settings in the cache, with their size; None when there are none."""
    others = sorted(entry for entry in _entries(cache) if entry not in used)
    if not others:
        return None
    size = human_bytes(sum(map(_size, others)))
    names = listed([entry.name for entry in others])
    return (
        f"{cache} also holds {counted(len(others), 'preparation')} that this run does not use, {size}: {names}; "
        "other runs may; delete the folders that none needs"
    )


def _entries(cache: Path) -> list[Path]:
    if not cache.is_dir():
        return []
    marks = [PREPARE_WORK_FOLDER, MANIFEST, *(f"{split}/{MANIFEST}" for split in SPLITS)]
    return [path for path in cache.iterdir() if any((path / mark).exists() for mark in marks)]


def _size(folder: Path) -> int:
    """Count the bytes below a folder."""
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(where, name)
            total += os.lstat(path).st_size if os.path.lexists(path) else 0
    return total
