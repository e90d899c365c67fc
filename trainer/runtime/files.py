"""Files that survive a crash: written, synced and renamed, and hashed."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import xxhash

_LFS_POINTER = b"version https://git-lfs"
_LARGEST_POINTER = 1024  # bytes


def file_hash(path: Path, on_read: Callable[[int], None] | None = None) -> str:
    """Compute the xxh3_128 of a file, hexadecimal; `on_read` is told the bytes of each part that is read."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while part := file.read(1 << 22):
            digest.update(part)
            if on_read is not None:
                on_read(len(part))
    return digest.hexdigest()


def file_sums(folder: Path) -> dict[str, tuple[int, str]]:
    """List the names of the files in a folder, in order, each with [bytes, xxh3_128]."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return {path.name: (path.stat().st_size, file_hash(path)) for path in files}


def bytes_hash(content: bytes) -> str:
    """Compute the xxh3_128 of some bytes, hexadecimal."""
    return xxhash.xxh3_128_hexdigest(content)


def shipped(package: str, name: str) -> Path:
    """Give the path of a file or folder that ships inside a package, in a clone and in an installed wheel."""
    return Path(str(files(package) / name))


def json_hash(content: Any) -> str:
    """Compute the xxh3_128 of a JSON value with sorted keys: the checksum that a manifest has of itself."""
    return bytes_hash(json.dumps(content, sort_keys=True).encode())


def is_lfs_pointer(path: Path) -> bool:
    """Say whether a file is the small text that Git LFS leaves where a clone did not fetch the content."""
    try:
        is_small = path.is_file() and path.stat().st_size <= _LARGEST_POINTER
        return is_small and path.read_bytes().startswith(_LFS_POINTER)
    except OSError:
        return False


def write_synced(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        sync_and_close(file)


def replace_synced(path: Path, content: bytes, temporary: Path | None = None) -> None:
    """Write a file so that a reader sees the old or the new content, never a part; durable on return.

    Args:
        temporary: where it is written first; a `unique_name` if several processes may write the file at once.
    """
    temporary = temporary or path.with_name(f".{path.name}.tmp")
    write_synced(temporary, content)
    os.replace(temporary, path)
    sync_folder(path.parent)


def create_synced(path: Path, content: bytes) -> bool:
    """Write a file unless it exists, so that a reader never sees a part of it; of several processes one wins.

    Returns:
        whether this call wrote it.
    """
    temporary = unique_name(path)
    write_synced(temporary, content)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links: no way to tell who was first
        if path.exists():
            return False
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
    return True


def unique_name(path: Path) -> Path:
    """Make a temporary name beside `path` that no other process takes, on whatever machine."""
    return path.with_name(f".{path.name}.{unique_token()}.tmp")


def unique_token() -> str:
    return uuid.uuid4().hex[:12]


def sync_and_close(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


def sync_files(folder: Path) -> None:
    """Make the files of a folder durable."""
    for path in sorted(folder.iterdir()):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def give_usual_mode(path: Path) -> None:
    """Let a file be read by whom the umask allows: safetensors and tempfile make files for their owner alone."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")  # asking by os.umask sets it
    mask = next(int(line.split()[1], 8) for line in status.splitlines() if line.startswith("Umask:"))
    path.chmod(0o666 & ~mask)
