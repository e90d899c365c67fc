"""`maskwright data show` and `maskwright data verify`: what is in the shards, and whether it is whole.

Results go to stdout, progress to the console.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from tools.prepare.job import TOKENIZER_FOLDER
from tools.prepare.progress import ReadProgress
from tools.prepare.summary import human_bytes, unused_tail_tokens
from tools.show_marks import SENTENCE_MARK, WORD_MARK, MarkedText
from trainer.data.dataset import ShardSet
from trainer.data.manifest import (
    MANIFEST,
    SENTENCE_STARTS,
    SPLITS,
    TOKEN_MARKS,
    WORD_STARTS,
    Manifest,
    ShardEntry,
    read_data_manifest,
)
from trainer.data.shard_checks import check_content, document_starts, file_fault, verify_shard
from trainer.data.token_marks import SETTING_OF_MARK, marks_of, read_marks, starts_at
from trainer.data.tokenizer import load_tokenizer, tokenizer_sha256
from trainer.errors import DamagedError, UserError
from trainer.runtime.paths import real_path, user_path
from trainer.runtime.plain_text import listed, printable

BLOCK_TOKENS = 510  # seq_len 512 without its two special tokens
BLOCKS_SHOWN = 3
BORDER = "\n──── end of document ────\n"
_SCANNED_TOKENS = 1 << 22
_FAULTS_IN_CARD = 8


def show(folder: str | Path, as_json: bool = False, console: Console | None = None) -> None:
    """Print counts, sizes and three decoded blocks of a data set, or of both splits of a folder.

    Where words and sentences start is shown too when the shards hold it: words in alternating colours where `console`
    has colours, else with marks, in JSON as lists.

    Raises:
        UserError: when the folder holds no data set.
        DamagedError: when a file is missing or of the wrong size.
    """
    opened = {name: ShardSet(path) for name, path in _data_sets(folder).items()}
    if as_json:
        facts = {
            name: {**_describe(data), "samples": [s.facts for s in _samples(data)]} for name, data in opened.items()
        }
        _write(json.dumps(facts, indent=1, ensure_ascii=False))
        return
    coloured = console is not None and console.color_system is not None and not console.no_color
    for name, data in opened.items():
        facts = _describe(data)
        _write(f"{name}  ({facts['folder']})")
        _write(f"  documents  {facts['documents']:,}, {facts['mean_document_tokens']:.1f} tokens each on average")
        _write(f"  tokens     {facts['tokens']:,} as {facts['dtype']} in {facts['shards']:,} shard(s)")
        _write(f"  size       {human_bytes(facts['bytes'])}")
        _write(f"  blocks     {facts['blocks']:,} of seq_len 512, {facts['unused_tail_tokens']:,} tokens left over")
        _write(f"  tokenizer  {facts['vocabulary_size']:,} tokens, sha256 {facts['tokenizer_sha256'][:16]}…")
        sources = ", ".join(f"{source['name']} ({human_bytes(source['bytes'])})" for source in facts["sources"])
        _write(f"  from       {sources}")
        for line in _mark_lines(data.manifest, coloured):
            _write(line)
        for sample in _samples(data):
            _write(f"\n═══ block {sample.block:,} ═══")
            if coloured and sample.marked:
                assert console is not None
                console.print(Text(BORDER).join(part.coloured() for part in sample.marked), soft_wrap=True)
            else:
                _write(BORDER.join(part.plain() for part in sample.marked) if sample.marked else sample.text)
        _write("")


def verify(folder: str | Path, as_json: bool = False, console: Console | None = None) -> None:
    """Check every byte of a data set (or of both splits) against its checksums, and its parts against each other.

    Raises:
        UserError: when the folder holds no data set.
        DamagedError: names every damaged file, with the bytes concerned.
    """
    console = console or Console(stderr=True, markup=False)
    data_sets, faults = _read_manifests(_data_sets(folder))
    shards = [(path, manifest, entry) for path, manifest in data_sets.items() for entry in manifest.shards]
    total = sum(size for _, _, entry in shards for size, _ in entry.files.values())
    faults += [fault for path, manifest in data_sets.items() for fault in _manifest_faults(path, manifest)]
    with ReadProgress(console, "Verifying", total) as progress, ThreadPoolExecutor(_thread_count()) as pool:
        read = 0
        futures = {pool.submit(_shard_faults, *shard): shard[2] for shard in shards}
        for future in as_completed(futures):
            faults += future.result()
            read += sum(size for size, _ in futures[future].files.values())
            progress.update(read)
    faults = sorted(set(faults))
    if as_json:
        facts = {"folder": str(folder), "whole": not faults, "shards": len(shards), "bytes": total, "faults": faults}
        _write(json.dumps(facts, indent=1, ensure_ascii=False))
    if faults:
        raise DamagedError(
            f"{len(faults)} fault{'s' if len(faults) > 1 else ''}: {listed(faults, _FAULTS_IN_CARD, '; ')}.",
            where=str(folder),
            remedy="Copy the named files again from where they are whole, or prepare the data set again.",
        )
    if not as_json:
        tokens = sum(manifest.tokens for manifest in data_sets.values())
        _write(f"Whole: {len(shards):,} shard(s), {tokens:,} tokens, {human_bytes(total)} match their checksums.")


def holds_data(folder: str | Path) -> bool:
    """Tell whether a folder is a data set, or has one in a split."""
    path = user_path(folder)
    return any((path / name / MANIFEST).is_file() for name in ("", *SPLITS))


def _data_sets(folder: str | Path) -> dict[str, Path]:
    """Find the data set in a folder, or its splits: both, where one of them has a manifest."""
    path = user_path(folder)
    if (path / MANIFEST).is_file() or not any((path / name / MANIFEST).is_file() for name in SPLITS):
        read_data_manifest(path)  # says what is wrong when it is none
        return {real_path(path).name: path}
    return {name: path / name for name in SPLITS}


def _read_manifests(data_sets: dict[str, Path]) -> tuple[dict[Path, Manifest], list[str]]:
    """Read the manifests that can be read, by folder, and say what is wrong with the others."""
    manifests, faults = {}, []
    for path in data_sets.values():
        try:
            manifests[path] = read_data_manifest(path)
        except DamagedError as error:
            faults.append(f"{path.name}/{MANIFEST}: {error.problem}")
    return manifests, faults


def _describe(data: ShardSet) -> dict[str, Any]:
    manifest = data.manifest
    return {
        "folder": str(data.folder),
        "documents": manifest.documents,
        "tokens": manifest.tokens,
        "mean_document_tokens": (manifest.tokens - manifest.documents) / max(1, manifest.documents),
        "dtype": data.dtype.name,
        "shards": len(manifest.shards),
        "bytes": sum(size for entry in manifest.shards for size, _ in entry.files.values()),
        "blocks": data.block_count(BLOCK_TOKENS),
        "unused_tail_tokens": unused_tail_tokens(manifest.tokens),
        "vocabulary_size": manifest.vocabulary_size,
        "tokenizer_sha256": manifest.tokenizer_sha256,
        "fingerprint": manifest.fingerprint,
        "settings": manifest.settings,
        "statistics": manifest.statistics,
        "sources": list(manifest.sources),
    }


def _mark_lines(manifest: Manifest, coloured: bool) -> Iterator[str]:
    """Say what marked words and sentences, and how they are shown."""
    marks = marks_of(manifest)
    for mark, label, sign in (
        (WORD_STARTS, "words", "alternating colours" if coloured else f"{WORD_MARK} before each"),
        (SENTENCE_STARTS, "sentences", f"{SENTENCE_MARK} before each"),
    ):
        if mark in marks:
            yield f"  {label:<10} marked by {manifest.settings.get(SETTING_OF_MARK[mark], 'another tool')}; {sign}"


@dataclass(frozen=True)
class _Sample:
    """A block, decoded; `marked` has a part for each document in it, none when the shards have no token marks."""

    block: int
    text: str
    marks: tuple[str, ...]
    marked: list[MarkedText]

    @property
    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"block": self.block, "text": self.text}
        if WORD_STARTS in self.marks:
            facts["words"] = [word for part in self.marked for word in part.words]
        if SENTENCE_STARTS in self.marks:
            facts["sentences"] = [sentence for part in self.marked for sentence in part.sentences]
        return facts


def _samples(data: ShardSet) -> Iterator[_Sample]:
    """Read the first, the middle and the last block."""
    folder = tokenizer_folder(data.folder)
    if folder is None or not data.tokens:
        return
    tokenizer = load_tokenizer(folder)
    payload = min(BLOCK_TOKENS, data.tokens)
    last = data.block_count(payload) - 1
    marks = marks_of(data.manifest)
    for block in sorted({round(number * last / (BLOCKS_SHOWN - 1)) for number in range(BLOCKS_SHOWN)}):
        ids = data.read_blocks(np.array([block]), payload)[0]
        starts = {mark: _starts(data, mark, block * payload, payload) for mark in marks}
        parts, marked, start = [], [], 0
        for end in [*_document_ends(data, block * payload, payload), payload]:
            parts.append(tokenizer.decode(ids[start:end].tolist(), clean_up_tokenization_spaces=False))
            if marks:
                own = {mark: bits[start:end] for mark, bits in starts.items()}
                marked.append(MarkedText(tokenizer, ids[start:end], own))
            start = end + 1  # the separator itself is shown as the border
        yield _Sample(block, BORDER.join(parts), marks, marked)


def _document_ends(data: ShardSet, start: int, length: int) -> list[int]:
    """Find where the separators lie among `length` tokens from token `start` on, from the document offsets."""
    ends = []
    for entry, base in _shards_of(data, start, length):
        check_content(data.folder, entry, "doc")
        separators = document_starts(data.folder, entry)[1:].astype(np.int64) - 1 + base - start
        ends += separators[(separators >= 0) & (separators < length)].tolist()
    return ends


def _starts(data: ShardSet, mark: str, start: int, length: int) -> np.ndarray:
    """Read the bits of a token mark from token `start` on: bool [length]."""
    parts = []
    for entry, base in _shards_of(data, start, length):
        check_content(data.folder, entry, mark)
        first, end = max(start - base, 0), min(start + length - base, entry.tokens)
        parts.append(read_marks(data.folder, entry, mark, first, end))
    return np.concatenate(parts)


def _shards_of(data: ShardSet, start: int, length: int) -> Iterator[tuple[ShardEntry, int]]:
    """Find the shards that hold some of `length` tokens from `start` on, each with the number of its first token."""
    base = 0
    for entry in data.manifest.shards:
        if base < start + length and base + entry.tokens > start:
            yield entry, base
        base += entry.tokens


def tokenizer_folder(data_set: Path) -> Path | None:
    """Find the copy of the tokenizer that `prepare` keeps in the data set or, for a split, beside it."""
    for folder in (data_set / TOKENIZER_FOLDER, real_path(data_set).parent / TOKENIZER_FOLDER):
        if folder.is_dir():
            return folder
    return None


def _manifest_faults(folder: Path, manifest: Manifest) -> list[str]:
    faults = []
    for mark, setting in SETTING_OF_MARK.items():
        lacking = [entry.name for entry in manifest.shards if mark not in entry.files]
        if setting in manifest.settings and lacking:
            faults.append(f"{MANIFEST}: {setting} are set, but {lacking[0]} has no .{mark}")
    return [*(f"{folder.name}/{fault}" for fault in faults), *_tokenizer_faults(folder, manifest)]


def _tokenizer_faults(folder: Path, manifest: Manifest) -> list[str]:
    copy = tokenizer_folder(folder)
    if copy is None:
        return []
    place = f"{folder.name}/{copy.name}" if copy.parent == folder else copy.name  # two splits share one beside them
    found = (file_fault(copy / name, *sums) for name, sums in manifest.tokenizer_files.items())
    faults = [f"{place}/{fault}" for fault in found if fault]
    try:
        if tokenizer_sha256(load_tokenizer(copy)) != manifest.tokenizer_sha256:
            faults.append(f"{place}: not the tokenizer that wrote the shards")
    except UserError as error:
        faults.append(f"{place}: {error.problem}")
    return faults


def _shard_faults(folder: Path, manifest: Manifest, entry: ShardEntry) -> list[str]:
    faults = verify_shard(folder, entry) or _inconsistencies(folder, manifest, entry)
    return [f"{folder.name}/{fault}" for fault in faults]


def _inconsistencies(folder: Path, manifest: Manifest, entry: ShardEntry) -> list[str]:
    """Check whether a shard that matches its checksums also makes sense."""
    if not entry.tokens:
        return []
    starts = document_starts(folder, entry).astype(np.int64)
    if (
        len(starts) != entry.documents + 1
        or starts[0] != 0
        or starts[-1] != entry.tokens
        or (np.diff(starts) < 1).any()
    ):
        return [f"{entry.name}.doc: not the borders of {entry.documents:,} documents in {entry.tokens:,} tokens"]
    tokens = np.memmap(folder / f"{entry.name}.tok", manifest.dtype, "r")
    if (tokens[starts[1:] - 1] != manifest.separator_id).any():
        return [f"{entry.name}.doc: a document does not end with the separator {manifest.separator_id}"]
    for start in range(0, len(tokens), _SCANNED_TOKENS):
        largest = int(tokens[start : start + _SCANNED_TOKENS].max())
        if largest >= manifest.vocabulary_size:
            return [f"{entry.name}.tok: token {largest:,} in a vocabulary of {manifest.vocabulary_size:,}"]
    marks = [mark for mark in TOKEN_MARKS if mark in entry.files]
    return [fault for mark in marks for fault in _mark_faults(folder, entry, mark, starts)]


def _mark_faults(folder: Path, entry: ShardEntry, mark: str, documents: np.ndarray) -> list[str]:
    """Check whether a token mark fits the tokens and, int64 [documents + 1], the borders of the documents."""
    name = f"{entry.name}.{mark}"
    packed = np.memmap(folder / name, np.uint8, "r")
    if entry.tokens % 8 and packed[-1] >> entry.tokens % 8:
        return [f"{name}: bits are set after the last of {entry.tokens:,} tokens"]
    if starts_at(packed, documents[1:] - 1).any():
        return [f"{name}: a separator is marked as a start"]
    if not starts_at(packed, documents[:-1][np.diff(documents) > 1]).all():
        return [f"{name}: the first token of a document is not marked as a start"]
    return []


def _thread_count() -> int:
    return min(8, len(os.sched_getaffinity(0)))


def _write(text: str) -> None:
    sys.stdout.write(printable(text) + "\n")
