"""Shards: flat token files, written once. `trainer.data.dataset` reads them as blocks.

A data set is a folder with `manifest.json` and, for each shard,

- `NAME.tok`: little-endian uint16 (vocabulary ≤ 65,536) or uint32: the content tokens of each document, then
  one separator. No other special tokens;
- `NAME.doc`: little-endian uint64, one more than there are documents: where each document starts in
  NAME.tok, in tokens, and last the number of tokens. The only authority on document borders;
- `NAME.sum`: little-endian uint64 xxh3 sums, one for each MiB of NAME.tok;
- `NAME.wrd`, `NAME.snt`, on request: where words and sentences start (`trainer.data.token_marks`).

Read in the order of the manifest the shards are one long stream of tokens. A block is a view of `payload`
consecutive tokens of that stream, so the sequence length can change without tokenizing again. A folder
without a manifest is not a data set. `trainer.data.manifest_checks` says what a manifest may hold.
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
from pydantic import ConfigDict

from trainer.data.manifest_checks import check_entry, check_manifest, is_shard_name
from trainer.data.token_marks import StartPlaneWriter
from trainer.errors import DamagedError, MaskwrightError, UserError
from trainer.runtime.files import file_hash, json_hash, sync_and_close, sync_folder, unique_token, write_synced
from trainer.runtime.paths import user_path
from trainer.runtime.typed_json import Count, as_type

FORMAT = "maskwright-shards"
VERSION = 1
MANIFEST = "manifest.json"
SUFFIXES = ("tok", "doc", "sum")  # of every shard; start planes come on request
SUM_BYTES = 1 << 20  # bytes of NAME.tok behind one sum
SPLITS = ("train", "validation")  # folders of the two data sets of `prepare --validation-fraction`
PREPARE_WORK_FOLDER, IMPORT_WORK_FOLDER = ".prepare", ".import"  # in the output of a job that is not finished
CONTENT_DIFFERS = "content differs from its checksum"
_SEPARATOR_STARTS_NOTHING = np.zeros(1, bool)


@dataclass(frozen=True)
class ShardEntry:
    """One shard as the manifest records it; `files` maps a suffix (tok, doc, sum, wrd, snt) to [bytes, xxh3_128]."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    tokens: Count
    documents: Count
    files: dict[str, tuple[Count, str]]


@dataclass(frozen=True)
class Manifest:
    """What a data set is. It holds no times and no paths of a machine: the same input gives the same bytes.

    `tokenizer_files` maps the names of the files of the tokenizer's copy to [bytes, xxh3_128]; none in older data
    sets, and in those without a copy.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    dtype: str
    tokenizer_sha256: str
    vocabulary_size: Count
    separator_id: Count
    tokens: Count
    documents: Count
    shards: tuple[ShardEntry, ...]
    sources: tuple[dict[str, Any], ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    statistics: dict[str, Any] = field(default_factory=dict)
    written_by: str = ""
    tokenizer_files: dict[str, tuple[Count, str]] = field(default_factory=dict)

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
        content = json.loads(json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}))  # as it is read
        content["checksum"] = json_hash(content)
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def token_dtype(vocabulary_size: int) -> np.dtype:
    return np.dtype("<u2") if vocabulary_size <= 1 << 16 else np.dtype("<u4")


def read_manifest(folder: str | Path) -> Manifest:
    """Read and check `folder/manifest.json`.

    Raises:
        UserError: when the folder is no data set.
        DamagedError: when the manifest is missing where shards are, cannot be read, contradicts itself or is of another
            version.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise _no_manifest(Path(folder))
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        checksum = raw.pop("checksum", None)  # data sets from before it had one have none
        if checksum is not None and checksum != json_hash(raw):
            raise ValueError("its content differs from its checksum")
        if raw.pop("format") != FORMAT or raw.pop("version") != VERSION:
            raise ValueError("not a manifest of this version")
        manifest = as_type(Manifest, raw)
        check_manifest(manifest, token_dtype(manifest.vocabulary_size))
        return manifest
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(
            f"Cannot read the manifest: {error}.",
            where=str(path),
            remedy="Copy it again from where it is whole, or prepare the data set again.",
        ) from None


def read_entry(raw: dict[str, Any]) -> ShardEntry:
    """The entry of a shard as the record of a unit has it.

    Raises:
        ValueError: when its types are wrong, its sizes contradict each other, or its name leads out of the folder.
    """
    entry = as_type(ShardEntry, raw)
    check_entry(entry)
    return entry


def _no_manifest(folder: Path) -> UserError | DamagedError:
    """Why a folder without a manifest is no data set: damage, where there are shards that nobody is writing."""
    work_folders = [PREPARE_WORK_FOLDER, IMPORT_WORK_FOLDER]
    unfinished = any((place / name).exists() for place in (folder, folder.parent) for name in work_folders)
    inner = [name for name in SPLITS if (folder / name / MANIFEST).is_file()]
    beside = [name for name in SPLITS if folder.name in SPLITS and (folder.parent / name / MANIFEST).is_file()]
    lost = [place for place in (folder, *(folder / name for name in SPLITS)) if _holds_shards(place)]
    if beside and folder not in lost:
        lost.append(folder)
    if lost and not unfinished:
        return DamagedError(
            f"'{lost[0]}' belongs to a data set, but its {MANIFEST} is missing.",
            where=str(lost[0] / MANIFEST),
            remedy="Copy it again from where it is whole, or prepare the data set again.",
        )
    remedy = f"Did you mean {folder / inner[0]}? " if inner else ""
    reason = f"it has no {MANIFEST}"
    if not folder.exists():
        reason, remedy = "there is nothing at this path", "Correct the path. "
    return UserError(
        f"'{folder}' is not a prepared data set: {reason}.",
        where=str(folder),
        remedy=remedy + "Write one with `maskwright prepare --input TEXT --tokenizer DIR --output DIR`; "
        "if that was interrupted, run the same command again.",
    )


def _holds_shards(folder: Path) -> bool:
    """Whether there are token files, and no manifest."""
    return not (folder / MANIFEST).is_file() and any(folder.glob("*.tok"))


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
    assert is_shard_name(name)
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
