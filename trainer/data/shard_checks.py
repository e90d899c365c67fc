"""Whether the files of a shard are those that its manifest records."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import xxhash

from trainer.data.manifest import SUM_BYTES, ShardEntry
from trainer.errors import DamagedError, MaskwrightError
from trainer.runtime.files import file_hash

CONTENT_DIFFERS = "content differs from its checksum"


def document_starts(folder: Path, entry: ShardEntry) -> np.ndarray:
    """Read the token offsets of the documents within the shard, then its length: uint64 [documents + 1]."""
    return np.fromfile(folder / f"{entry.name}.doc", "<u8")


def check_sizes(folder: Path, entry: ShardEntry) -> None:
    """Raise DamagedError when a file of the shard is missing or has another size than recorded."""
    for suffix, (size, _) in entry.files.items():
        path = folder / f"{entry.name}.{suffix}"
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found:,} bytes"
            raise DamagedError(
                f"Shard file {path.name} {state}; its manifest says {size:,} bytes.",
                where=str(path),
                remedy="Copy the data set again, or prepare it again; `maskwright data verify` lists all damage.",
            )


def check_content(folder: Path, entry: ShardEntry, suffix: str) -> None:
    """Raise DamagedError when a file of a shard, read whole, differs from its checksum, or cannot be read."""
    path = folder / f"{entry.name}.{suffix}"
    size, digest = entry.files[suffix]
    try:
        whole = path.stat().st_size == size and file_hash(path) == digest
        problem = f"{path.name} differs from its checksum in the manifest"
    except FileNotFoundError:
        whole, problem = False, f"{path.name} is missing"
    except OSError as error:
        raise MaskwrightError(
            f"Cannot read {path.name}: {error.strerror}.",
            where=str(path),
            remedy="Check the file system; then start the same command again.",
        ) from None
    if not whole:
        raise DamagedError(
            f"{problem}.",
            where=str(path),
            remedy="Copy the shard again from where it is whole, or prepare the data set again; "
            "`maskwright data verify` lists all damage.",
        )


def verify_shard(folder: Path, entry: ShardEntry, progress: Callable[[int], None] | None = None) -> list[str]:
    """Compare every byte of a shard with its sums; returns one line for each fault, none when it is whole."""
    faults = []
    for suffix, (size, digest) in entry.files.items():
        fault = file_fault(folder / f"{entry.name}.{suffix}", size, digest)
        if fault.endswith(CONTENT_DIFFERS):
            fault += _damaged_places(folder, entry, suffix)
        faults += [fault] if fault else []
        if progress:
            progress(size)
    return faults


def file_fault(path: Path, size: int, digest: str) -> str:
    """Say in what a file differs from its size in bytes and its xxh3_128; empty when it is whole."""
    if not path.is_file():
        return f"{path.name}: missing"
    if (found := path.stat().st_size) != size:
        return f"{path.name}: {found:,} bytes instead of {size:,}"
    return f"{path.name}: {CONTENT_DIFFERS}" if file_hash(path) != digest else ""


def _damaged_places(folder: Path, entry: ShardEntry, suffix: str) -> str:
    sums_path = folder / f"{entry.name}.sum"
    if suffix != "tok" or not sums_path.is_file():
        return ""
    expected, found = np.fromfile(sums_path, "<u8"), mebibyte_sums(folder / f"{entry.name}.tok")
    if len(expected) != len(found):
        return ""
    places = [f"{i * SUM_BYTES:,}..{(i + 1) * SUM_BYTES:,}" for i in np.flatnonzero(expected != found)[:4]]
    return f" in bytes {', '.join(places)}" if places else ""


def mebibyte_sums(path: Path) -> np.ndarray:
    with open(path, "rb") as file:
        return np.array([xxhash.xxh3_64_intdigest(part) for part in iter(lambda: file.read(SUM_BYTES), b"")], "<u8")
