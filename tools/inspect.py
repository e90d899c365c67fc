"""`maskwright data show` and `maskwright data verify`: what is in the shards, and whether it is whole.

Results go to stdout, progress to the console.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from tools.prepare.job import SPLITS, TOKENIZER_FOLDER
from tools.prepare.progress import ReadProgress
from tools.prepare.summary import human_bytes, unused_tail_tokens
from trainer.data.shard_set import ShardSet
from trainer.data.shards import (
    MANIFEST,
    Manifest,
    ShardEntry,
    document_starts,
    read_manifest,
    verify_shard,
)
from trainer.data.vocabulary import load_tokenizer, tokenizer_sha256
from trainer.errors import DamagedError, UserError

BLOCK_TOKENS = 510  # seq_len 512 without its two special tokens
BLOCKS_SHOWN = 3
BORDER = "\n──── end of document ────\n"
_SCANNED_TOKENS = 1 << 22
_FAULTS_IN_CARD = 8


def show(folder: str | Path, as_json: bool = False, console: Console | None = None) -> None:
    """Print counts, sizes and three decoded blocks of a data set, or of both splits of a folder.

    Raises:
        UserError: when the folder holds no data set.
        DamagedError: when a file is missing or of the wrong size.
    """
    described = {name: _describe(path) for name, path in _data_sets(folder).items()}
    if as_json:
        _write(json.dumps(described, indent=1, ensure_ascii=False))
        return
    for name, facts in described.items():
        _write(f"{name}  ({facts['folder']})")
        _write(f"  documents  {facts['documents']:,}, {facts['mean_document_tokens']:.1f} tokens each on average")
        _write(f"  tokens     {facts['tokens']:,} as {facts['dtype']} in {facts['shards']:,} shard(s)")
        _write(f"  size       {human_bytes(facts['bytes'])}")
        _write(f"  blocks     {facts['blocks']:,} of seq_len 512, {facts['unused_tail_tokens']:,} tokens left over")
        _write(f"  tokenizer  {facts['vocabulary_size']:,} tokens, sha256 {facts['tokenizer_sha256'][:16]}…")
        sources = ", ".join(f"{source['name']} ({human_bytes(source['bytes'])})" for source in facts["sources"])
        _write(f"  from       {sources}")
        for sample in facts["samples"]:
            _write(f"\n═══ block {sample['block']:,} ═══\n{sample['text']}")
        _write("")


def verify(folder: str | Path, as_json: bool = False, console: Console | None = None) -> None:
    """Check every byte of a data set (or of both splits) against its checksums, and its parts against each other.

    Raises:
        UserError: when the folder holds no data set.
        DamagedError: names every damaged file, with the bytes concerned.
    """
    console = console or Console(stderr=True, markup=False)
    data_sets = {path: read_manifest(path) for path in _data_sets(folder).values()}
    shards = [(path, manifest, entry) for path, manifest in data_sets.items() for entry in manifest.shards]
    total = sum(size for _, _, entry in shards for size, _ in entry.files.values())
    faults = [fault for path, manifest in data_sets.items() for fault in _manifest_faults(path, manifest)]
    with ReadProgress(console, "Verifying", total) as progress, ThreadPoolExecutor(_thread_count()) as pool:
        read = 0
        futures = {pool.submit(_shard_faults, *shard): shard[2] for shard in shards}
        for future in as_completed(futures):
            faults += future.result()
            read += sum(size for size, _ in futures[future].files.values())
            progress.update(read)
    faults.sort()
    if as_json:
        facts = {"folder": str(folder), "whole": not faults, "shards": len(shards), "bytes": total, "faults": faults}
        _write(json.dumps(facts, indent=1, ensure_ascii=False))
    if faults:
        more = f" and {len(faults) - _FAULTS_IN_CARD} more" if len(faults) > _FAULTS_IN_CARD else ""
        raise DamagedError(
            f"{len(faults)} fault{'s' if len(faults) > 1 else ''}: {'; '.join(faults[:_FAULTS_IN_CARD])}{more}.",
            where=str(folder),
            remedy="Copy the named files again from where they are whole, or prepare the data set again.",
        )
    if not as_json:
        tokens = sum(manifest.tokens for manifest in data_sets.values())
        _write(f"Whole: {len(shards):,} shard(s), {tokens:,} tokens, {human_bytes(total)} match their checksums.")


def _data_sets(folder: str | Path) -> dict[str, Path]:
    """The data set in a folder, or its splits."""
    path = Path(folder).expanduser()
    inner = {name: path / name for name in SPLITS if (path / name / MANIFEST).is_file()}
    if (path / MANIFEST).is_file() or not inner:
        read_manifest(path)  # says what is wrong when it is none
        return {path.resolve().name: path}
    return inner


def _describe(folder: Path) -> dict[str, Any]:
    data = ShardSet(folder)
    manifest = data.manifest
    return {
        "folder": str(folder),
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
        "samples": list(_samples(data)),
    }


def _samples(data: ShardSet) -> Iterator[dict[str, Any]]:
    """The first, the middle and the last block, decoded."""
    folder = tokenizer_folder(data.folder)
    if folder is None or not data.tokens:
        return
    tokenizer = load_tokenizer(folder)
    payload = min(BLOCK_TOKENS, data.tokens)
    last = data.block_count(payload) - 1
    for block in sorted({round(number * last / (BLOCKS_SHOWN - 1)) for number in range(BLOCKS_SHOWN)}):
        ids = data.read_blocks(np.array([block]), payload)[0]
        parts, start = [], 0
        for end in [*_document_ends(data, block * payload, payload), payload]:
            parts.append(tokenizer.decode(ids[start:end].tolist(), clean_up_tokenization_spaces=False))
            start = end + 1  # the separator itself is shown as the border
        yield {"block": block, "text": BORDER.join(parts)}


def _document_ends(data: ShardSet, start: int, length: int) -> list[int]:
    """Where the separators lie among `length` tokens from token `start` on, from the document offsets."""
    ends, base = [], 0
    for entry in data.manifest.shards:
        if base < start + length and base + entry.tokens > start:
            separators = document_starts(data.folder, entry)[1:].astype(np.int64) - 1 + base - start
            ends += separators[(separators >= 0) & (separators < length)].tolist()
        base += entry.tokens
    return ends


def tokenizer_folder(data_set: Path) -> Path | None:
    """The copy of the tokenizer that `prepare` keeps in the data set or, for a split, beside it."""
    for folder in (data_set / TOKENIZER_FOLDER, data_set.resolve().parent / TOKENIZER_FOLDER):
        if folder.is_dir():
            return folder
    return None


def _manifest_faults(folder: Path, manifest: Manifest) -> list[str]:
    faults = []
    for name in ("tokens", "documents"):
        counted, said = sum(getattr(entry, name) for entry in manifest.shards), getattr(manifest, name)
        if counted != said:
            faults.append(f"{MANIFEST}: {said:,} {name}, but its shards have {counted:,}")
    copy = tokenizer_folder(folder)
    if copy is not None:
        try:
            if tokenizer_sha256(load_tokenizer(copy)) != manifest.tokenizer_sha256:
                faults.append(f"{copy.name}: not the tokenizer that wrote the shards")
        except UserError as error:
            faults.append(f"{copy.name}: {error.problem}")
    return [f"{folder.name}/{fault}" for fault in faults]


def _shard_faults(folder: Path, manifest: Manifest, entry: ShardEntry) -> list[str]:
    faults = verify_shard(folder, entry) or _inconsistencies(folder, manifest, entry)
    return [f"{folder.name}/{fault}" for fault in faults]


def _inconsistencies(folder: Path, manifest: Manifest, entry: ShardEntry) -> list[str]:
    """Whether a shard that matches its checksums also makes sense."""
    dtype = np.dtype(manifest.dtype)
    if entry.files["tok"][0] != entry.tokens * dtype.itemsize:
        return [f"{entry.name}.tok: {entry.files['tok'][0]:,} bytes cannot be {entry.tokens:,} tokens of {dtype.name}"]
    starts = document_starts(folder, entry).astype(np.int64)
    if (
        len(starts) != entry.documents + 1
        or starts[0] != 0
        or starts[-1] != entry.tokens
        or (np.diff(starts) < 1).any()
    ):
        return [f"{entry.name}.doc: not the borders of {entry.documents:,} documents in {entry.tokens:,} tokens"]
    tokens = np.memmap(folder / f"{entry.name}.tok", dtype, "r")
    if (tokens[starts[1:] - 1] != manifest.separator_id).any():
        return [f"{entry.name}.doc: a document does not end with the separator {manifest.separator_id}"]
    for start in range(0, len(tokens), _SCANNED_TOKENS):
        largest = int(tokens[start : start + _SCANNED_TOKENS].max())
        if largest >= manifest.vocabulary_size:
            return [f"{entry.name}.tok: token {largest:,} in a vocabulary of {manifest.vocabulary_size:,}"]
    return []


def _thread_count() -> int:
    return min(8, len(os.sched_getaffinity(0)))


def _write(text: str) -> None:
    sys.stdout.write(text + "\n")
