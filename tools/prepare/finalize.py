"""Joining the finished units: manifests are written last, so that a folder with a manifest is whole."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tools.prepare.bad_documents import Losses
from tools.prepare.job import Job
from tools.prepare.option_names import OptionNames
from tools.prepare.plan import Unit
from tools.prepare.special_tokens import TokenTally
from tools.prepare.summary import counted, describe_refused
from tools.prepare.work_folder import foreign_parts, remove_temporaries
from tools.prepare.worker import UnitRecord, read_unit_record, record_path
from trainer.data.manifest import MANIFEST, Manifest
from trainer.errors import UserError
from trainer.runtime.files import file_sums, replace_synced, sync_folder
from trainer.runtime.plain_text import listed


def collect_records(job: Job, tasks: int | None = None) -> list[UnitRecord]:
    """Collect the records of all units in order.

    Args:
        tasks: how many tasks the job had, to say which of them is missing.

    Raises:
        UserError: when a unit is missing, or when there are parts that are not this job's; they are named.
    """
    records: list[UnitRecord] = []
    missing: list[Unit] = []
    foreign: list[Path] = []
    for unit in job.units:
        record = read_unit_record(job.work_folder, unit.number)
        if record is not None and record.identity != job.identity(unit):
            foreign.append(record_path(job.work_folder, unit.number))
        elif (record := job.record(unit)) is None:
            missing.append(unit)
        else:
            records.append(record)
    names = {folder: job.shard_files(missing) | _shard_files(records, split) for split, folder in job.folders.items()}
    _refuse_foreign(job, foreign + foreign_parts(job, names))
    _refuse_missing(job, missing, tasks)
    return records


def write_manifests(job: Job, records: Sequence[UnitRecord]) -> dict[str, Manifest]:
    """Write the manifest of each split, the training one last.

    Raises:
        UserError: when a split would have no document.
    """
    manifests = {name: _join(job, records, name) for name in job.folders}
    _refuse_empty(manifests, job.names)
    remove_temporaries(job)
    for name, folder in reversed(job.folders.items()):
        replace_synced(folder / MANIFEST, manifests[name].to_json().encode())
    return manifests


def total_losses(records: Sequence[UnitRecord]) -> Losses:
    """Add up what all units left out or repaired; reasons in alphabetical order."""
    refused: Counter[str] = Counter()
    for record in records:
        refused.update(record.losses.refused)
    return Losses(
        dict(sorted(refused.items())),
        sum(record.losses.refused_bytes for record in records),
        sum(record.losses.repaired for record in records),
    )


def remove_work_folder(job: Job) -> None:
    """Remove the work folder: the last step of a job."""
    if job.work_folder.is_dir():
        shutil.rmtree(job.work_folder, ignore_errors=True)
        sync_folder(job.output)


def _shard_files(records: Sequence[UnitRecord], split: str) -> set[str]:
    entries = [entry for record in records if (entry := record.splits[split].entry)]
    return {f"{entry.name}.{suffix}" for entry in entries for suffix in entry.files}


def _refuse_foreign(job: Job, foreign: Sequence[Path]) -> None:
    if foreign:
        raise UserError(
            "The folder holds parts that are not of this job: "
            f"{listed([str(path.relative_to(job.output)) for path in foreign], 8)}.",
            where=str(job.output),
            remedy="Delete them, or give the options and the input that they were written with. "
            "The units that are then missing are named.",
        )


def _refuse_missing(job: Job, missing: Sequence[Unit], tasks: int | None) -> None:
    if not missing:
        return
    command = "the same command without --finalize"
    if tasks is not None:
        own = [f"--task {task}/{tasks}" for task in sorted({unit.number % tasks for unit in missing})]
        command = f"the same command with {listed(own)} in place of --finalize"
    raise UserError(
        f"{len(missing):,} of {counted(len(job.units), 'unit')} are not written, or not whole: "
        f"{listed([f'unit {unit.number} ({unit.describe()})' for unit in missing])}.",
        where=str(job.output),
        remedy=f"Run {command}, then this one again; finished units are kept.",
    )


def _join(job: Job, records: Sequence[UnitRecord], name: str) -> Manifest:
    splits = [record.splits[name] for record in records]
    entries = tuple(split.entry for split in splits if split.entry)
    losses = total_losses(records)
    tally = TokenTally()
    for record in records:
        tally.add(record.tally)
    statistics: dict[str, Any] = {
        "text_bytes": sum(split.text_bytes for split in splits),
        "longest_document_tokens": max((split.longest_document_tokens for split in splits), default=0),
        "empty_documents_in_input": sum(record.empty_documents for record in records),
        "refused_documents_in_input": losses.refused,
        "tokens_in_input": asdict(tally),
    }
    if losses.refused_bytes:
        statistics["refused_bytes_in_input"] = losses.refused_bytes
    if losses.repaired:
        statistics["repaired_documents_in_input"] = losses.repaired
    return Manifest(
        dtype=job.dtype.str,
        tokenizer_sha256=job.vocabulary.sha256,
        vocabulary_size=job.vocabulary.size,
        separator_id=job.vocabulary.separator_id,
        tokens=sum(entry.tokens for entry in entries),
        documents=sum(entry.documents for entry in entries),
        shards=entries,
        sources=job.inputs.sources,
        settings=job.settings,
        statistics=statistics,
        written_by=f"maskwright {version('maskwright')}",
        tokenizer_files=file_sums(job.tokenizer_folder),
    )


def _refuse_empty(manifests: dict[str, Manifest], names: OptionNames) -> None:
    total = sum(manifest.documents for manifest in manifests.values())
    if not total:
        statistics = manifests["train"].statistics
        left_out = ""
        if empty := statistics["empty_documents_in_input"]:
            left_out += f" {empty:,} were empty."
        if refused := statistics["refused_documents_in_input"]:
            left_out += f" Refused: {describe_refused(refused)}."
        raise UserError(
            f"The input holds no documents.{left_out}",
            where=names("input"),
            remedy=f"Give files that hold text; see {names('field')}.",
        )
    for name, manifest in manifests.items():
        if not manifest.documents:
            raise UserError(
                f"Of {total:,} documents none falls into the {name} split.",
                where=names("validation-fraction"),
                remedy="Choose another fraction, give more text, or cut it into more documents "
                f"({names('documents', 'line')}).",
            )
