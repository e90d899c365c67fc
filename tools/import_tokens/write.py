"""Shards from imported documents: the token file itself, linked, where it is what a shard holds; else a new one.

Each shard that is finished has a record in the work folder, so that a run that was killed keeps it. A token
file is linked under the shard's own name, never under a temporary one: those are opened for writing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from tools.import_tokens.clean import Cleaner, Counts
from tools.import_tokens.source import FlatFile, TokenSource
from tools.prepare.worker import choose_split
from trainer.data.manifest import SUM_BYTES, ShardEntry, read_entry
from trainer.data.shard_checks import check_sizes
from trainer.data.shard_writer import ShardWriter
from trainer.errors import DamagedError
from trainer.runtime.files import file_hash, replace_synced, sync_folder
from trainer.runtime.paths import real_path

HARD_LINK, SYMBOLIC_LINK = "hard link", "symbolic link"

Report = Callable[[float], None]
"""Called now and then with the share of a shard that is done, in documents."""


@dataclass(frozen=True)
class ShardSettings:
    """What is the same for all shards. `folders` maps a split to its folder: {"train": …} or with "validation"."""

    work_folder: Path
    folders: dict[str, Path]
    dtype: np.dtype
    separator_id: int
    validation_fraction: float


@dataclass
class SplitPart:
    """What a shard's documents gave a split; `entry` is None when that is nothing."""

    entry: ShardEntry | None = None
    longest_document_tokens: int = 0


@dataclass
class ShardRecord:
    """A finished shard number, as `shard-NNNNN.json` in the work folder holds it; `link` is empty for a new file."""

    identity: str
    link: str = ""
    counts: Counts = field(default_factory=Counts)
    splits: dict[str, SplitPart] = field(default_factory=dict)

    def is_whole(self, folders: dict[str, Path]) -> bool:
        """Tell whether the recorded files are there with the recorded sizes."""
        try:
            for name, part in self.splits.items():
                if part.entry:
                    check_sizes(folders[name], part.entry)
        except (DamagedError, KeyError):
            return False
        return True


def read_shard_record(work_folder: Path, number: int) -> ShardRecord | None:
    """Read the record of a shard number; None when there is none or it cannot be read."""
    try:
        raw: dict[str, Any] = json.loads(_record_path(work_folder, number).read_text())
        counts = Counts(**raw.pop("counts"))
        counts.removed = {int(number): count for number, count in counts.removed.items()}
        splits = {}
        for name, part in raw.pop("splits").items():
            entry = part.pop("entry")
            splits[name] = SplitPart(read_entry(entry) if entry else None, **part)
        return ShardRecord(counts=counts, splits=splits, **raw)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _write_record(work_folder: Path, number: int, record: ShardRecord) -> None:
    replace_synced(_record_path(work_folder, number), json.dumps(asdict(record)).encode())


def _record_path(work_folder: Path, number: int) -> Path:
    return work_folder / f"shard-{number:05d}.json"


def write_shard(
    source: TokenSource,
    documents: tuple[int, int],
    number: int,
    identity: str,
    cleaner: Cleaner,
    settings: ShardSettings,
    report: Report,
) -> ShardRecord:
    """Write documents [first, last) of a source as shard `number` of each split, then its record."""
    record = ShardRecord(identity, splits={name: SplitPart() for name in settings.folders})
    writers: dict[str, ShardWriter] = {}
    first, last = documents
    for chunk in source.chunks(first, last):
        cleaned = cleaner.clean(chunk, source)
        record.counts.add(cleaned.counts)
        for ids in _documents(cleaned.tokens, cleaned.ends):
            name = _split_of(ids, settings.validation_fraction)
            if name not in writers:
                shard = f"shard-{number:05d}"
                writers[name] = ShardWriter(settings.folders[name], shard, settings.dtype, settings.separator_id)
            writers[name].add_document(ids)
            part = record.splits[name]
            part.longest_document_tokens = max(part.longest_document_tokens, len(ids))
        report((chunk.first + len(chunk.document_ends) - first) / (last - first))
    for name, writer in writers.items():
        record.splits[name].entry = writer.close()
    _write_record(settings.work_folder, number, record)
    return record


def _documents(tokens: np.ndarray, ends: np.ndarray) -> Iterator[np.ndarray]:
    start = 0
    for end in ends.tolist():
        yield tokens[start:end]
        start = end


def _split_of(ids: np.ndarray, validation_fraction: float) -> str:
    """Choose the split by the hash of the ids, as the text is not known: equal documents are on the same side."""
    return choose_split(ids.astype("<u4").tobytes(), validation_fraction) if validation_fraction else "train"


def link_shard(
    source: FlatFile, number: int, identity: str, cleaner: Cleaner, settings: ShardSettings, link: str, report: Report
) -> ShardRecord | int:
    """Make the token file of a source shard `number` of "train", as it is; then write its record.

    Returns:
        the record, or the number of the first document that is not stored as a shard has it: then nothing is written.
    """
    counts, longest = Counts(), 0
    starts = [np.zeros(1, np.int64)]
    for chunk in source.chunks(0, source.documents):
        cleaned = cleaner.clean(chunk, source)
        if cleaned.differs is not None:
            return cleaned.differs
        counts.add(cleaned.counts)
        starts.append(chunk.sequence_ends[chunk.document_ends - 1] + starts[-1][-1])
        longest = max(longest, int(np.diff(starts[-1], prepend=starts[-2][-1]).max()) - 1)
        report(0.5 * (chunk.first + len(chunk.document_ends)) / source.documents)
    folder, name = settings.folders["train"], f"shard-{number:05d}"
    token_file = folder / f"{name}.tok"
    token_file.unlink(missing_ok=True)
    _link(Path(source.path), token_file, link)
    sums, digest = _sums_and_hash(token_file, lambda share: report(0.5 + 0.5 * share))
    files = {"tok": (token_file.stat().st_size, digest)}
    for suffix, content in (("doc", np.concatenate(starts).astype("<u8")), ("sum", sums)):
        path = folder / f"{name}.{suffix}"
        replace_synced(path, content.tobytes())
        files[suffix] = (path.stat().st_size, file_hash(path))
    sync_folder(folder)
    entry = ShardEntry(name, source.tokens, source.documents, files)
    record = ShardRecord(identity, link, counts, {"train": SplitPart(entry, longest)})
    _write_record(settings.work_folder, number, record)
    return record


def possible_link(source: Path, work_folder: Path, symbolic: bool) -> str | None:
    """Find how a file can be linked to from the output: hard, else (when allowed) symbolic; None when not at all."""
    probe = work_folder / "link"
    for link in (HARD_LINK, SYMBOLIC_LINK) if symbolic else (HARD_LINK,):
        probe.unlink(missing_ok=True)
        try:
            _link(source, probe, link)
        except OSError:  # another file system, or one without links
            continue
        probe.unlink()
        return link
    return None


def _link(source: Path, target: Path, link: str) -> None:
    if link == HARD_LINK:
        os.link(real_path(source), target)
    else:
        target.symlink_to(real_path(source))


def _sums_and_hash(path: Path, report: Report) -> tuple[np.ndarray, str]:
    """Compute the sums and the hash of a token file, in one pass: it may be larger than memory."""
    sums, digest, size = [], xxhash.xxh3_128(), path.stat().st_size
    with open(path, "rb") as file:
        while part := file.read(SUM_BYTES):
            sums.append(xxhash.xxh3_64_intdigest(part))
            digest.update(part)
            report(len(sums) * SUM_BYTES / size)
    return np.array(sums, "<u8"), digest.hexdigest()
