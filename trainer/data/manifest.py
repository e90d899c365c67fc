"""What a data set on disk is: its manifest, and what that may hold.

A data set is a folder with `manifest.json` and, for each shard,

- `NAME.tok`: little-endian uint16 (vocabulary ≤ 65,536) or uint32: the content tokens of each document, then
  one separator. No other special tokens;
- `NAME.doc`: little-endian uint64, one more than there are documents: where each document starts in
  NAME.tok, in tokens, and last the number of tokens. The only authority on document borders;
- `NAME.sum`: little-endian uint64 xxh3 sums, one for each MiB of NAME.tok;
- `NAME.wrd`, `NAME.snt`, on request: where words and sentences start (`trainer.data.token_marks`).

Read in the order of the manifest the shards are one long stream of tokens. A block is a view of `payload`
consecutive tokens of that stream, so the sequence length can change without tokenizing again. A folder
without a manifest is not a data set.

A number that is changed in a manifest would move every later block without a word, and a name could lead out of the
folder. So both are checked whenever one is read; types come first (`trainer.runtime.typed_json`). No shard is read.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ConfigDict

from trainer.errors import DamagedError, UserError
from trainer.runtime.files import json_hash
from trainer.runtime.paths import user_path
from trainer.runtime.typed_json import Count, as_type

WORD_STARTS = "wrd"
SENTENCE_STARTS = "snt"
TOKEN_MARKS = (WORD_STARTS, SENTENCE_STARTS)
STARTS_OF = {WORD_STARTS: "word", SENTENCE_STARTS: "sentence"}
"""What starts at a token that has the mark."""


def mark_bytes(tokens: int) -> int:
    """Compute the size of a mark in bytes."""
    return -(-tokens // 8)


FORMAT = "maskwright-shards"
VERSION = 1
MANIFEST = "manifest.json"
SUFFIXES = ("tok", "doc", "sum")  # of every shard; token marks come on request
SUM_BYTES = 1 << 20  # bytes of NAME.tok behind one sum
SPLITS = ("train", "validation")  # folders of the two data sets of `prepare --validation-fraction`
PREPARE_WORK_FOLDER, IMPORT_WORK_FOLDER = ".prepare", ".import"  # in the output of a job that is not finished


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
        """List each shard's name and the sums of its tokens and borders: what a later start is compared with."""
        return [[entry.name, entry.files["tok"][1], entry.files["doc"][1]] for entry in self.shards]

    def mark_identity(self, mark: str) -> str:
        """Compute a sha256 over a token mark of all shards; the fingerprint leaves it out, because few read it."""
        return hashlib.sha256(json.dumps([entry.files[mark][1] for entry in self.shards]).encode()).hexdigest()

    def to_json(self) -> str:
        content = json.loads(json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}))  # as it is read
        content["checksum"] = json_hash(content)
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def token_dtype(vocabulary_size: int) -> np.dtype:
    return np.dtype("<u2") if vocabulary_size <= 1 << 16 else np.dtype("<u4")


def read_data_manifest(folder: str | Path) -> Manifest:
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
    """Read the entry of a shard as the record of a unit has it.

    Raises:
        ValueError: when its types are wrong, its sizes contradict each other, or its name leads out of the folder.
    """
    entry = as_type(ShardEntry, raw)
    check_entry(entry)
    return entry


def _no_manifest(folder: Path) -> UserError | DamagedError:
    """Say why a folder without a manifest is no data set: damage, where there are shards that nobody is writing."""
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
    """Tell whether there are token files, and no manifest."""
    return not (folder / MANIFEST).is_file() and any(folder.glob("*.tok"))


def split_folder(path: str | Path, split: str) -> Path:
    """Return `path` itself, or `path/split` when `prepare --validation-fraction` wrote both splits there."""
    outer = user_path(path)
    inner = outer / split
    return inner if not (outer / MANIFEST).is_file() and (inner / MANIFEST).is_file() else outer


_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")
_NUMBER_BYTES = 8  # of an entry of NAME.doc and NAME.sum
_NEEDED = ("tok", "doc", "sum")
_SHOWN_CHARACTERS = 60


def is_shard_name(name: str) -> bool:
    """Tell whether files called NAME.tok, NAME.doc, … lie in the folder of the manifest, whatever the name."""
    return _NAME.fullmatch(name) is not None


def check_entry(entry: ShardEntry, item_bytes: int | None = None) -> None:
    """Raise ValueError when an entry contradicts itself.

    Args:
        item_bytes: a token; None where it is not known.
    """
    if not is_shard_name(entry.name):
        raise ValueError(f"shards: {entry.name[:_SHOWN_CHARACTERS]!r} cannot be the name of a shard")
    unknown = sorted(entry.files.keys() - {*_NEEDED, *TOKEN_MARKS})
    lacking = [suffix for suffix in _NEEDED if suffix not in entry.files]
    if unknown or lacking:
        problem = f"has no .{lacking[0]}" if lacking else f"has a .{unknown[0][:_SHOWN_CHARACTERS]}"
        raise ValueError(f"shards: {entry.name} {problem}")
    if entry.documents > entry.tokens or (entry.tokens and not entry.documents):
        raise ValueError(f"shards: {entry.name} has {entry.documents:,} documents in {entry.tokens:,} tokens")
    sizes = {suffix: size for suffix, (size, _) in entry.files.items()}
    expected = {"doc": (entry.documents + 1) * _NUMBER_BYTES, "sum": -(-sizes["tok"] >> 20) * _NUMBER_BYTES}
    expected |= {mark: mark_bytes(entry.tokens) for mark in TOKEN_MARKS if mark in sizes}
    if item_bytes is not None:
        expected["tok"] = entry.tokens * item_bytes
    for suffix, size in expected.items():
        if sizes[suffix] != size:
            held = f"{entry.tokens:,} tokens and {entry.documents:,} documents"
            raise ValueError(f"shards: {entry.name}.{suffix}: {sizes[suffix]:,} bytes, but {size:,} hold {held}")


def check_manifest(manifest: Manifest, dtype: np.dtype) -> None:
    """Raise ValueError when a manifest contradicts itself.

    Args:
        dtype: in which a vocabulary of this size is stored.
    """
    if manifest.dtype != dtype.str:
        found = repr(manifest.dtype[:_SHOWN_CHARACTERS])
        raise ValueError(f"dtype is {found}, but a vocabulary of {manifest.vocabulary_size:,} has {dtype.str}")
    for entry in manifest.shards:
        check_entry(entry, dtype.itemsize)
    if len({entry.name for entry in manifest.shards}) < len(manifest.shards):
        raise ValueError("shards: two have the same name")
    for name in ("tokens", "documents"):
        counted, said = sum(getattr(entry, name) for entry in manifest.shards), getattr(manifest, name)
        if counted != said:
            raise ValueError(f"{name} is {said:,}, but the shards have {counted:,}")
    if manifest.separator_id > np.iinfo(dtype).max:
        raise ValueError(f"separator_id is {manifest.separator_id:,}, which {dtype.str} cannot hold")
    for source in manifest.sources:
        if not isinstance(source.get("name"), str) or not _is_count(source.get("bytes")):
            raise ValueError("sources: each must have a name and bytes")
    for name in manifest.tokenizer_files:
        if not is_shard_name(name):
            raise ValueError(f"tokenizer_files: {name[:_SHOWN_CHARACTERS]!r} cannot be the name of a file")
    longest = manifest.statistics.get("longest_document_tokens", 0)
    if not _is_count(longest) or longest > manifest.tokens:
        raise ValueError(f"statistics.longest_document_tokens is {str(longest)[:_SHOWN_CHARACTERS]}")


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0
