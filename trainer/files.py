"""Files that survive a crash: written, synced and renamed, and hashed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import xxhash


def file_hash(path: Path) -> str:
    """xxh3_128 of a file, hexadecimal."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while part := file.read(1 << 22):
            digest.update(part)
    return digest.hexdigest()


def write_synced(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        sync_and_close(file)


def replace_synced(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old or the new content, never a part; durable on return."""
    temporary = path.with_name(f".{path.name}.tmp")
    write_synced(temporary, content)
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_and_close(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_local(name: str | Path) -> bool:
    """Whether the name of a Hugging Face folder means a path on this machine, and not a name on the hub.

    `org/name` is a hub name unless there is a folder `org` here: a mistyped path then fails at once, instead of
    after the hub's retries.
    """
    path, text = Path(name).expanduser(), str(name)
    return (
        path.is_absolute()
        or text.startswith((".", "~"))
        or text.count("/") > 1
        or path.exists()
        or ("/" in text and path.parent.is_dir())
    )
