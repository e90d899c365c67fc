"""One call of `prepare`, resolved: what it reads and writes, which unit is which, and what is finished."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from tools.prepare.csv_rows import check_delimiter
from tools.prepare.inputs import find_inputs, resolve_documents
from tools.prepare.option_names import COMMAND_LINE, OptionNames
from tools.prepare.options import PrepareOptions
from tools.prepare.pieces import InputFiles, TextSettings
from tools.prepare.plan import Unit, plan_units
from tools.prepare.segment import StartSettings
from tools.prepare.special_tokens import SpecialTokens, resolve_special_in_text
from tools.prepare.summary import counted, human_bytes
from tools.prepare.worker import UnitRecord, WorkSettings, read_unit_record
from trainer.data.manifest import (
    MANIFEST,
    PREPARE_WORK_FOLDER,
    SPLITS,
    SUFFIXES,
    Manifest,
    read_data_manifest,
    token_dtype,
)
from trainer.data.shard_checks import check_sizes
from trainer.data.tokenizer import Vocabulary, load_tokenizer, read_vocabulary
from trainer.data.tokenizer_files import loading_note
from trainer.errors import DamagedError, UserError, nearest
from trainer.runtime.paths import user_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENIZER_FOLDER = "tokenizer"
JOB_FILE = "job.json"  # in the work folder
ON_BAD_DOCUMENT = ("stop", "skip")


def open_job(
    inputs: Sequence[str],
    tokenizer: str,
    output: str,
    options: PrepareOptions = PrepareOptions(),  # noqa: B008 - it is frozen
    names: OptionNames = COMMAND_LINE,
    excluded: Sequence[str | os.PathLike[str]] = (),
) -> Job:
    """Find the inputs and load the tokenizer; nothing is written yet.

    Files count as unchanged when name, size and modification time are.

    Args:
        inputs: files, globs, folders; with format "hub" data set names, NAME, NAME:CONFIG or NAME:CONFIG:SPLIT.
        tokenizer: folder or hub name of a fast tokenizer.
        names: how messages name the options.
        excluded: folders that are not searched for input besides `output`.

    Raises:
        UserError: for any mistake in the arguments or the input.
    """
    _check_fraction(options.validation_fraction, names)
    check_on_bad_document(options.on_bad_document, names)
    folder = user_path(output, "--output")
    found = find_inputs(inputs, options.format, names, [folder, *excluded])
    documents = resolve_documents(options.documents, found.format, names)
    loaded = load_tokenizer(tokenizer)
    starts = StartSettings(options.word_starts, options.sentence_starts)
    starts.check(loaded.backend_tokenizer)
    vocabulary = read_vocabulary(loaded, tokenizer)
    begun = [*(folder / name / MANIFEST for name in ("", *SPLITS)), folder / PREPARE_WORK_FOLDER / JOB_FILE]
    return Job(
        output=folder,
        inputs=found,
        documents=documents,
        field=options.field,
        validation_fraction=options.validation_fraction,
        skip_bad_documents=options.on_bad_document == "skip",
        starts=starts,
        special=SpecialTokens.of(loaded, vocabulary, resolve_special_in_text(options.special_in_text, begun)),
        tokenizer=loaded,
        vocabulary=vocabulary,
        delimiter=check_delimiter(options.delimiter, found.format, names),
        names=names,
        tokenizer_notes=tuple(filter(None, (loading_note(tokenizer), _lacking_note(vocabulary)))),
    )


def _check_fraction(fraction: float, names: OptionNames) -> None:
    if not 0.0 <= fraction < 1.0:
        raise UserError(
            f"The validation fraction must be at least 0 and below 1, got {fraction:g}.",
            where=names("validation-fraction"),
            remedy="0.01 holds out one document in a hundred.",
        )


def _lacking_note(vocabulary: Vocabulary) -> str:
    return (
        "tokenizer: it has no mask token, which causal models do without, and masked ones do not"
        if "mask" in vocabulary.lacking
        else ""
    )


def check_on_bad_document(given: str, names: OptionNames) -> None:
    """Refuse an unknown way with documents that cannot be read."""
    if given not in ON_BAD_DOCUMENT:
        raise UserError(
            f"Unknown way '{given}' with bad documents.{nearest(given, ON_BAD_DOCUMENT)}",
            where=names("on-bad-document", given),
            remedy=f"Choose {' or '.join(ON_BAD_DOCUMENT)}.",
        )


@dataclass(frozen=True)
class Job:
    """One resolved call of `prepare`; see `open_job`."""

    output: Path
    inputs: InputFiles
    documents: str
    field: str
    validation_fraction: float
    skip_bad_documents: bool
    starts: StartSettings
    special: SpecialTokens
    tokenizer: PreTrainedTokenizerFast
    vocabulary: Vocabulary
    delimiter: str | None = None
    names: OptionNames = COMMAND_LINE
    tokenizer_notes: tuple[str, ...] = ()

    @property
    def work_folder(self) -> Path:
        return self.output / PREPARE_WORK_FOLDER

    @property
    def tokenizer_folder(self) -> Path:
        return self.output / TOKENIZER_FOLDER

    @property
    def folders(self) -> dict[str, Path]:
        """Where each split goes: the output itself, or one folder in it for each when some text is held out."""
        return {name: self.output / name for name in SPLITS} if self.validation_fraction else {"train": self.output}

    @property
    def dtype(self) -> np.dtype:
        return token_dtype(self.vocabulary.size)

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """All units, whoever writes them."""
        return plan_units(self.inputs, self.documents)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What the manifest records of the call; `inputs` is a hash of the names and sizes of all files."""
        listing = repr([(file.name, file.size, file.parts, file.revision) for file in self.inputs.files])
        return {
            "format": self.inputs.format,
            "documents": self.documents,
            "field": None if self.inputs.format == "text" else self.field,
            **({"delimiter": self.delimiter} if self.delimiter else {}),
            "validation_fraction": self.validation_fraction,
            "inputs": xxhash.xxh3_128_hexdigest(listing.encode()),
            **self.starts.recorded(),
            **self.special.recorded(),
        }

    def shard_files(self, units: Iterable[Unit]) -> set[str]:
        """Name the files that units become."""
        return {f"{unit.shard}.{suffix}" for unit in units for suffix in (*SUFFIXES, *self.starts.by_mark)}

    def identity(self, unit: Unit) -> str:
        """Hash all that decides the shards of a unit."""
        return unit.identity({**self.settings, "inputs": None, "tokenizer": self.vocabulary.sha256})

    def work_settings(self) -> WorkSettings:
        """Collect what the workers need to know."""
        return WorkSettings(
            work_folder=str(self.work_folder),
            splits={name: str(folder) for name, folder in self.folders.items()},
            tokenizer_file=str(self.tokenizer_folder / "tokenizer.json"),
            dtype=self.dtype.str,
            separator_id=self.vocabulary.separator_id,
            validation_fraction=self.validation_fraction,
            reading=TextSettings(
                self.inputs.format,
                self.documents,
                self.field,
                str(self.work_folder / "scratch"),
                self.delimiter,
                "skip" if self.skip_bad_documents else "stop",
                self.names,
            ),
            starts=self.starts,
            special=self.special,
        )

    def record(self, unit: Unit) -> UnitRecord | None:
        """Read the record of a unit that is finished and whole; None when it is to be written."""
        record = read_unit_record(self.work_folder, unit.number)
        if record is None or record.identity != self.identity(unit) or not self.is_whole(record):
            return None
        return record if self.skip_bad_documents or not record.losses.refused else None

    def is_whole(self, record: UnitRecord) -> bool:
        """Tell whether the shards of a recorded unit are there with the recorded sizes."""
        try:
            for name, split in record.splits.items():
                if split.entry:
                    check_sizes(self.folders[name], split.entry)
        except (DamagedError, KeyError):
            return False
        return True

    def finished(self) -> dict[str, Manifest] | None:
        """Read the manifests that an earlier run of the same job wrote; None when it still has work to do.

        Raises:
            UserError: when the output holds the data set of another job: nothing is ever overwritten.
        """
        manifests: dict[str, Manifest] = {}
        for folder in (self.output, *(self.output / name for name in SPLITS)):
            if (folder / MANIFEST).is_file():
                manifest = read_data_manifest(folder)
                self._refuse_other(folder, manifest)
                manifests.update({name: manifest for name, own in self.folders.items() if own == folder})
        return manifests if len(manifests) == len(self.folders) else None

    def describe_inputs(self) -> str:
        count = len(self.inputs.files)
        size = human_bytes(self.inputs.size) if self.inputs.size else "size unknown"
        thing = "data set" if self.inputs.format == "hub" else "file"
        empty = f" ({self.inputs.empty:,} empty)" if self.inputs.empty else ""
        passed_over = f" Passed over: {self.inputs.passed_over}." if self.inputs.passed_over.total else ""
        return (
            f"Input: {counted(count, thing)}{empty}, {size}, format {self.inputs.format}, "
            f"one document a {self.documents}.{passed_over}"
        )

    def _refuse_other(self, folder: Path, manifest: Manifest) -> None:
        differs = setting_differences(manifest.settings, self.settings)
        if manifest.settings.get("inputs") != self.settings["inputs"]:
            differs.append("other input files")
        if manifest.tokenizer_sha256 != self.vocabulary.sha256:
            differs.append("another tokenizer")
        newest = max(file.mtime_ns for file in self.inputs.files)
        if newest > (folder / MANIFEST).stat().st_mtime_ns:
            differs.append("input files that have changed since")
        if manifest.statistics.get("refused_documents_in_input") and not self.skip_bad_documents:
            skip = self.names("on-bad-document", "skip")
            differs.append(f"input with bad documents, which were left out ({skip})")
        if differs:
            raise UserError(
                f"'{folder}' already holds a data set, prepared from {'; '.join(differs)}.",
                where=str(folder),
                remedy="Choose another --output, or delete the folder.",
            )


def setting_differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Name the settings in which two jobs differ, in words; the input files are left out."""
    return [
        f"{name} {found.get(name)!r} instead of {wanted.get(name)!r}"
        for name in {**wanted, **found}
        if name != "inputs" and found.get(name) != wanted.get(name)
    ]
