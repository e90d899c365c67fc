"""Shards: flat token files, written once. `trainer.data.shard_set` reads them as blocks.

A data set is a folder with `manifest.json` and, for each shard,

- `NAME.tok`: little-endian uint16 (vocabulary ≤ 65,536) or uint32: the content tokens of each document, then
  one separator. No other special tokens;
- `NAME.doc`: little-endian uint64, one more than there are documents: where each document starts in
  NAME.tok, in tokens, and last the number of tokens. The only authority on document borders;
- `NAME.sum`: little-endian uint64 xxh3 sums, one for each MiB of NAME.tok;
- `NAME.wrd`, `NAME.snt`, on request: where words and sentences start (`trainer.data.start_planes`).

Read in the order of the manifest the shards are one long stream of tokens. A block is a view of `payload`
consecutive tokens of that stream, so the sequence length can change without tokenizing again. A folder
without a manifest is not a data set.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from trainer.data.start_planes import StartPlaneWriter
from trainer.errors import DamagedError, UserError
from trainer.files import file_hash, sync_and_close, sync_folder, unique_token, write_synced
from trainer.paths import user_path

FORMAT = "maskwright-shards"
VERSION = 1
MANIFEST = "manifest.json"
SUFFIXES = ("tok", "doc", "sum")  # of every shard; start planes come on request
SUM_BYTES = 1 << 20  # bytes of NAME.tok behind one sum
_SEPARATOR_STARTS_NOTHING = np.zeros(1, bool)


@dataclass(frozen=True)
class ShardEntry:
    """One shard as the manifest records it; `files` maps a suffix (tok, doc, sum, wrd, snt) to [bytes, xxh3_128]."""

    name: str
    tokens: int
    documents: int
    files: dict[str, tuple[int, str]]


@dataclass(frozen=True)
class Manifest:
    """What a data set is. It holds no times and no paths of a machine: the same input gives the same bytes."""

    dtype: str
    tokenizer_sha256: str
    vocabulary_size: int
    separator_id: int
    tokens: int
    documents: int
    shards: tuple[ShardEntry, ...]
    sources: tuple[dict[str, Any], ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    statistics: dict[str, Any] = field(default_factory=dict)
    written_by: str = ""

    @property
    def fingerprint(self) -> str:
        """sha256 over everything that decides which token is where."""
        decisive = [self.dtype, self.tokenizer_sha256]
        decisive += [(entry.name, entry.tokens, entry.files["tok"][1], entry.files["doc"][1]) for entry in self.shards]
        return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()

    def shard_identities(self) -> list[list[str]]:
        """Of each shard its name and the sums of its tokens and borders: what a later start is compared with."""
        return [[entry.name, entry.files["tok"][1], entry.files["doc"][1]] for entry in self.shards]

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1, ensure_ascii=False) + "\n"


def token_dtype(vocabulary_size: int) -> np.dtype:
    return np.dtype("<u2") if vocabulary_size <= 1 << 16 else np.dtype("<u4")


def read_manifest(folder: str | Path) -> Manifest:
    """Read and check `folder/manifest.json`.

    Raises:
        UserError: when the folder is no data set.
        DamagedError: when the manifest cannot be read or is of another version.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        inner = [name for name in ("train", "validation") if (Path(folder) / name / MANIFEST).is_file()]
        remedy = f"Did you mean {Path(folder) / inner[0]}? " if inner else ""
        raise UserError(
            f"'{folder}' is not a prepared data set: it has no {MANIFEST}.",
            where=str(folder),
            remedy=remedy + "Write one with `maskwright prepare --input TEXT --tokenizer DIR --output DIR`; "
            "if that was interrupted, run the same command again.",
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw.pop("format") != FORMAT or raw.pop("version") != VERSION:
            raise ValueError("not a manifest of this version")
        entries = tuple(
            ShardEntry(**{**entry, "files": {k: (int(v[0]), str(v[1])) for k, v in entry["files"].items()}})
            for entry in raw.pop("shards")
        )
        sources = tuple(raw.pop("sources"))
        return Manifest(shards=entries, sources=sources, **raw)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(
            f"Cannot read the manifest: {error}.", where=str(path), remedy="Prepare the data set again."
        ) from None


def split_folder(path: str | Path, split: str) -> Path:
    """`path` itself, or `path/split` when `prepare --validation-fraction` wrote both splits there."""
    outer = user_path(path)
    inner = outer / split
    return inner if not (outer / MANIFEST).is_file() and (inner / MANIFEST).is_file() else outer


class ShardWriter:
    """Writes one shard under temporary names, and gives it its names when it is whole.

    The temporary names are its own: two processes that write the same shard cannot mix their bytes, and the shard
    is that of one of them.

    Args:
        planes: suffixes of the start planes to write beside the tokens.
    """

    def __init__(
        self, folder: str | Path, name: str, dtype: np.dtype, separator_id: int, planes: Sequence[str] = ()
    ) -> None:
        self.folder, self.name, self.dtype = Path(folder), name, np.dtype(dtype)
        self._separator = np.array([separator_id], self.dtype)
        self._starts, self._tokens = [0], 0
        self._unique = unique_token()
        self._file = open(self._temporary("tok"), "wb")
        self._planes = {plane: StartPlaneWriter(self._temporary(plane)) for plane in planes}

    def add_document(self, ids: list[int] | np.ndarray, starts: Mapping[str, np.ndarray] | None = None) -> None:
        """Append one document's content tokens and the separator.

        Args:
            ids: [n].
            starts: for each plane of this shard bool [n]; the separator gets a zero.
        """
        self._file.write(np.ascontiguousarray(ids, self.dtype).data)  # no copy: it may be gigabytes
        self._file.write(self._separator.tobytes())
        self._tokens += len(ids) + 1
        self._starts.append(self._tokens)
        for plane, writer in self._planes.items():
            assert starts is not None and len(starts[plane]) == len(ids)
            writer.append(starts[plane])
            writer.append(_SEPARATOR_STARTS_NOTHING)

    def close(self) -> ShardEntry:
        """Write `.doc` and `.sum`, sync, rename; the shard then exists. Returns its manifest entry."""
        sync_and_close(self._file)
        for writer in self._planes.values():
            writer.close()
        write_synced(self._temporary("doc"), np.array(self._starts, "<u8").tobytes())
        sums = mebibyte_sums(self._temporary("tok"))
        write_synced(self._temporary("sum"), sums.tobytes())
        files = {}
        for suffix in (*SUFFIXES, *self._planes):
            temporary = self._temporary(suffix)
            files[suffix] = (temporary.stat().st_size, file_hash(temporary))
            os.replace(temporary, self.folder / f"{self.name}.{suffix}")
        sync_folder(self.folder)
        return ShardEntry(self.name, self._tokens, len(self._starts) - 1, files)

    def _temporary(self, suffix: str) -> Path:
        return self.folder / f".{self.name}.{suffix}.{self._unique}.tmp"


def remove_shard(folder: Path, name: str) -> None:
    """Remove the files of a shard, if there are any."""
    for path in folder.glob(f"{name}.*"):
        path.unlink(missing_ok=True)


def document_starts(folder: Path, entry: ShardEntry) -> np.ndarray:
    """uint64 [documents + 1]: token offsets of the documents within the shard, then its length."""
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


def verify_shard(folder: Path, entry: ShardEntry, progress: Callable[[int], None] | None = None) -> list[str]:
    """Compare every byte of a shard with its sums; returns one line for each fault, none when it is whole."""
    faults = []
    for suffix, (size, digest) in entry.files.items():
        path = folder / f"{entry.name}.{suffix}"
        if not path.is_file():
            faults.append(f"{path.name}: missing")
        elif path.stat().st_size != size:
            faults.append(f"{path.name}: {path.stat().st_size:,} bytes instead of {size:,}")
        elif file_hash(path) != digest:
            faults.append(f"{path.name}: content differs from its checksum{_damaged_places(folder, entry, suffix)}")
        if progress:
            progress(size)
    return faults


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
