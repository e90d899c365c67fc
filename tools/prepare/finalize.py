"""Joining the finished units: manifests are written last, so that a folder with a manifest is whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.prepare.summary import SplitSummary
from tools.prepare.worker import WORK_FOLDER, UnitRecord
from trainer.data.shards import MANIFEST, Manifest, check_sizes
from trainer.errors import DamagedError, UserError
from trainer.files import replace_synced, sync_folder

SPLITS = ("train", "validation")
TOKENIZER_FOLDER = "tokenizer"


def split_folders(output: Path, validation_fraction: float) -> dict[str, Path]:
    """Where each split goes: the output itself, or one folder in it for each when some text is held out."""
    return {name: output / name for name in SPLITS} if validation_fraction else {"train": output}


def unit_is_whole(record: UnitRecord, folders: dict[str, Path]) -> bool:
    """Whether the shards of a recorded unit are there with the recorded sizes."""
    try:
        for name, split in record.splits.items():
            if split.entry:
                check_sizes(folders[name], split.entry)
    except DamagedError:
        return False
    return True


def write_manifests(
    records: Sequence[UnitRecord], folders: dict[str, Path], common: dict[str, Any]
) -> tuple[dict[str, SplitSummary], int]:
    """Write the manifest of each split, the training one last.

    Args:
        records: all units in order.
        common: the fields of Manifest that are the same for all splits.

    Returns:
        the splits, and the number of empty documents.

    Raises:
        UserError: when a split would have no document.
    """
    empty_documents = sum(record.empty_documents for record in records)
    manifests = {name: _join(records, name, common, empty_documents) for name in folders}
    _refuse_empty(manifests, empty_documents)
    for name in reversed(folders):
        _remove_strays(
            folders[name], {f"{shard.name}.{kind}" for shard in manifests[name].shards for kind in shard.files}
        )
        replace_synced(folders[name] / MANIFEST, manifests[name].to_json().encode())
    return {name: SplitSummary.of(folder, manifests[name]) for name, folder in folders.items()}, empty_documents


def clean_up(output: Path, folders: dict[str, Path]) -> None:
    """Remove the work folder, and the shards of an earlier run that had other splits."""
    for folder in {output, *(output / name for name in SPLITS)} - set(folders.values()):
        if folder.is_dir():
            _remove_strays(folder, set())
            if folder != output and not any(folder.iterdir()):
                folder.rmdir()
    shutil.rmtree(output / WORK_FOLDER, ignore_errors=True)
    sync_folder(output)


def sync_files(folder: Path) -> None:
    """Make the files of a folder durable."""
    for path in sorted(folder.iterdir()):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    sync_folder(folder)


def _join(records: Sequence[UnitRecord], name: str, common: dict[str, Any], empty_documents: int) -> Manifest:
    splits = [record.splits[name] for record in records]
    entries = tuple(split.entry for split in splits if split.entry)
    return Manifest(
        tokens=sum(entry.tokens for entry in entries),
        documents=sum(entry.documents for entry in entries),
        shards=entries,
        statistics={
            "text_bytes": sum(split.text_bytes for split in splits),
            "longest_document_tokens": max((split.longest_document_tokens for split in splits), default=0),
            "empty_documents_in_input": empty_documents,
        },
        **common,
    )


def _refuse_empty(manifests: dict[str, Manifest], empty_documents: int) -> None:
    total = sum(manifest.documents for manifest in manifests.values())
    if not total:
        empty = f" {empty_documents:,} were empty." if empty_documents else ""
        raise UserError(
            f"The input holds no documents.{empty}", where="--input", remedy="Give files that hold text; see --field."
        )
    for name, manifest in manifests.items():
        if not manifest.documents:
            raise UserError(
                f"Of {total:,} documents none falls into the {name} split.",
                where="--validation-fraction",
                remedy="Choose another fraction, give more text, or cut it into more documents (--documents line).",
            )


def _remove_strays(folder: Path, names: set[str]) -> None:
    """Remove shard files that no manifest names: leftovers of a killed run with other inputs or settings."""
    for path in [*folder.glob("shard-*"), *folder.glob(".shard-*.tmp")]:
        if path.name not in names:
            path.unlink()
