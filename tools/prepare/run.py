"""`maskwright prepare`, from the arguments to the summary."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from rich.console import Console

from tools.prepare import finalize
from tools.prepare.encode import Encoder
from tools.prepare.estimate import check_free_space, estimate_output
from tools.prepare.inputs import Inputs, find_inputs, resolve_documents
from tools.prepare.plan import Unit, plan_units
from tools.prepare.pool import run_units
from tools.prepare.progress import ReadProgress
from tools.prepare.readers import ReadSettings
from tools.prepare.segment import StartSettings
from tools.prepare.summary import PrepareSummary, SplitSummary, human_bytes, print_summary
from tools.prepare.worker import WORK_FOLDER, UnitRecord, WorkSettings, read_record
from trainer.data.shards import MANIFEST, Manifest, read_manifest, token_dtype
from trainer.data.vocabulary import Vocabulary, load_tokenizer, vocabulary_of
from trainer.errors import UserError


def prepare(
    inputs: Sequence[str],
    tokenizer: str,
    output: str,
    format: str = "auto",
    field: str = "text",
    documents: str | None = None,
    workers: int | None = None,
    validation_fraction: float = 0.0,
    word_starts: str | None = None,
    sentence_starts: str | None = None,
    console: Console | None = None,
) -> PrepareSummary:
    """Tokenize text into shards.

    The result is the same, byte for byte, for any number of workers and after any number of interruptions: run
    the same command again and it continues with the units that are not finished. Files count as unchanged when
    name, size and modification time are.

    Args:
        inputs: files, globs, folders; with format "hub" data set names, NAME or NAME:CONFIG.
        tokenizer: folder or hub name of a fast tokenizer.
        format: "auto" (by suffix), "text", "jsonl", "csv", "parquet", "arrow" or "hub".
        field: the column that holds the text, for all but text files.
        documents: "paragraph" (the default), "line" or "file" for text; "row" for the rest.
        workers: processes; default one for each usable core.
        validation_fraction: share of the documents held out, chosen by the hash of their text; above 0 the data
            sets are `output/train` and `output/validation`.
        word_starts: "tokenizer", "jieba" or "module:function": mark where words start (`trainer.data.start_planes`).
        sentence_starts: "rules" or "module:function": mark where sentences start.

    Raises:
        UserError: for any mistake in the arguments or the input, and when `output` holds something else.
        KeyboardInterrupt: on Ctrl-C or SIGTERM; finished units are kept.
    """
    started = time.monotonic()
    console = console or Console(markup=False)
    _check(validation_fraction, workers)
    found = find_inputs(inputs, format)
    documents = resolve_documents(documents, found.format)
    loaded = load_tokenizer(tokenizer)
    vocabulary = vocabulary_of(loaded, tokenizer)
    starts = StartSettings(word_starts, sentence_starts)
    starts.check(loaded.backend_tokenizer)
    settings = {**_settings(found, documents, field, validation_fraction), **starts.recorded()}
    job = _Job(Path(output).expanduser(), found, documents, field, validation_fraction, starts, vocabulary, settings)

    finished = job.finished()
    if finished is not None:
        summary = PrepareSummary(job.output, *finished, time.monotonic() - started, already_prepared=True)
        console.print(f"Already prepared: {job.output}", highlight=False, soft_wrap=True)
        print_summary(summary, console)
        return summary
    job.claim_folder()
    with _locked(job.work_folder), _interruptible(console):
        loaded.save_pretrained(str(job.tokenizer_folder))
        finalize.sync_files(job.tokenizer_folder)
        job.write_units(workers or len(os.sched_getaffinity(0)), console)
        splits, empty_documents = job.join()
    summary = PrepareSummary(job.output, splits, empty_documents, time.monotonic() - started, already_prepared=False)
    print_summary(summary, console)
    return summary


@dataclass(frozen=True)
class _Job:
    """One resolved call of `prepare`."""

    output: Path
    inputs: Inputs
    documents: str
    field: str
    validation_fraction: float
    starts: StartSettings
    vocabulary: Vocabulary
    settings: dict[str, Any]

    @property
    def work_folder(self) -> Path:
        return self.output / WORK_FOLDER

    @property
    def tokenizer_folder(self) -> Path:
        return self.output / finalize.TOKENIZER_FOLDER

    @property
    def folders(self) -> dict[str, Path]:
        return finalize.split_folders(self.output, self.validation_fraction)

    @property
    def dtype(self) -> np.dtype:
        return token_dtype(self.vocabulary.size)

    def finished(self) -> tuple[dict[str, SplitSummary], int] | None:
        """What an earlier run of the same job wrote, None when it still has work to do."""
        manifests: dict[str, Manifest] = {}
        for folder in (self.output, *(self.output / name for name in finalize.SPLITS)):
            if (folder / MANIFEST).is_file():
                manifest = read_manifest(folder)
                self._refuse_other(folder, manifest)
                manifests.update({name: manifest for name, own in self.folders.items() if own == folder})
        if len(manifests) < len(self.folders):
            return None
        finalize.clean_up(self.output, self.folders)
        splits = {name: SplitSummary.of(folder, manifests[name]) for name, folder in self.folders.items()}
        return splits, manifests["train"].statistics["empty_documents_in_input"]

    def _refuse_other(self, folder: Path, manifest: Manifest) -> None:
        """Raise UserError when the data set in `folder` is not this job's: nothing is ever overwritten."""
        differs = [
            f"{name} {manifest.settings.get(name)!r} instead of {self.settings.get(name)!r}"
            if name != "inputs"
            else "other input files"
            for name in {**self.settings, **manifest.settings}
            if manifest.settings.get(name) != self.settings.get(name)
        ]
        if manifest.tokenizer_sha256 != self.vocabulary.sha256:
            differs.append("another tokenizer")
        newest = max(file.mtime_ns for file in self.inputs.files)
        if newest > (folder / MANIFEST).stat().st_mtime_ns:
            differs.append("input files that have changed since")
        if differs:
            raise UserError(
                f"'{folder}' already holds a data set, prepared from {'; '.join(differs)}.",
                where=str(folder),
                remedy="Choose another --output, or delete the folder.",
            )

    def claim_folder(self) -> None:
        """Create the output; refuse one that holds anything that is not an interrupted run."""
        if self.output.exists() and not self.output.is_dir():
            raise UserError("The output is a file.", where=str(self.output), remedy="Choose another --output.")
        if self.output.is_dir() and not self.work_folder.is_dir() and any(self.output.iterdir()):
            held = ", ".join(sorted(path.name for path in self.output.iterdir())[:5])
            raise UserError(
                f"The output folder already holds other files: {held}.",
                where=str(self.output),
                remedy="Choose an --output that is new or empty.",
            )
        try:
            for folder in (self.work_folder, *self.folders.values()):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"Cannot create the output folder: {error.strerror}.",
                where=str(self.output),
                remedy="Choose another --output.",
            ) from None

    def write_units(self, workers: int, console: Console) -> None:
        """Tokenize all units that are not finished yet."""
        reading = ReadSettings(self.inputs.format, self.documents, self.field, str(self.work_folder / "scratch"))
        work = WorkSettings(
            work_folder=str(self.work_folder),
            splits={name: str(folder) for name, folder in self.folders.items()},
            tokenizer_file=str(self.tokenizer_folder / "tokenizer.json"),
            dtype=self.dtype.str,
            separator_id=self.vocabulary.separator_id,
            validation_fraction=self.validation_fraction,
            reading=reading,
            starts=self.starts,
        )
        units = plan_units(self.inputs, self.documents)
        tasks = [(unit, unit.identity(self._identity_settings())) for unit in units]
        remaining = [task for task in tasks if self._record(*task) is None]
        kept = len(tasks) - len(remaining)
        if not remaining:
            return
        console.print(self._describe_inputs(), highlight=False, soft_wrap=True)
        estimate = estimate_output(
            [unit for unit, _ in remaining],
            reading,
            Encoder(work.tokenizer_file, self.dtype),
            self.dtype,
            len(self.starts.of_plane),
        )
        again = f" {kept} of {len(tasks)} units are finished already." if kept else ""
        if estimate.tokens:
            console.print(
                f"Expect about {estimate.tokens:,.0f} tokens, {human_bytes(estimate.output_bytes)} of shards; "
                f"workers: {min(workers, len(remaining))}.{again}",
                highlight=False,
                soft_wrap=True,
            )
        check_free_space(self.output, estimate.output_bytes)
        with ReadProgress(console, "Tokenizing", sum(unit.size for unit, _ in remaining)) as progress:

            def show(state: dict[int, tuple[int, int]]) -> None:
                progress.update(sum(size for size, _ in state.values()), sum(tokens for _, tokens in state.values()))

            run_units(remaining, work, workers, show)

    def join(self) -> tuple[dict[str, SplitSummary], int]:
        """Check that every unit is there and write the manifests."""
        units = plan_units(self.inputs, self.documents)
        records = [self._record(unit, unit.identity(self._identity_settings())) for unit in units]
        whole = [record for record in records if record is not None]
        assert len(whole) == len(units), "a unit is missing after its worker reported it done"
        common = {
            "dtype": self.dtype.str,
            "tokenizer_sha256": self.vocabulary.sha256,
            "vocabulary_size": self.vocabulary.size,
            "separator_id": self.vocabulary.separator_id,
            "sources": self.inputs.sources,
            "settings": self.settings,
            "written_by": f"maskwright {version('maskwright')}",
        }
        result = finalize.write_manifests(whole, self.folders, common)
        finalize.clean_up(self.output, self.folders)
        return result

    def _record(self, unit: Unit, identity: str) -> UnitRecord | None:
        """The record of a unit that is finished and whole."""
        record = read_record(self.work_folder, unit.number)
        if record is None or record.identity != identity or not finalize.unit_is_whole(record, self.folders):
            return None
        return record

    def _identity_settings(self) -> dict[str, Any]:
        return {**self.settings, "inputs": None, "tokenizer": self.vocabulary.sha256}

    def _describe_inputs(self) -> str:
        count = len(self.inputs.files)
        size = human_bytes(self.inputs.size) if self.inputs.size else "size unknown"
        thing = "data set" if self.inputs.format == "hub" else "file"
        plural = "s" if count > 1 else ""
        return (
            f"Input: {count:,} {thing}{plural}, {size}, format {self.inputs.format}, one document a {self.documents}."
        )


def _settings(inputs: Inputs, documents: str, field: str, validation_fraction: float) -> dict[str, Any]:
    """What the manifest records of the call; `inputs` is a hash of the names and sizes of all files."""
    listing = repr([(file.name, file.size, file.parts, file.revision) for file in inputs.files])
    return {
        "format": inputs.format,
        "documents": documents,
        "field": None if inputs.format == "text" else field,
        "validation_fraction": validation_fraction,
        "inputs": xxhash.xxh3_128_hexdigest(listing.encode()),
    }


def _check(validation_fraction: float, workers: int | None) -> None:
    if not 0.0 <= validation_fraction < 1.0:
        raise UserError(
            f"The validation fraction must be at least 0 and below 1, got {validation_fraction:g}.",
            where="--validation-fraction",
            remedy="0.01 holds out one document in a hundred.",
        )
    if workers is not None and workers < 1:
        raise UserError(f"At least one worker is needed, got {workers}.", where="--workers", remedy="Leave it out.")


@contextlib.contextmanager
def _locked(work_folder: Path) -> Iterator[None]:
    """Keep a second `prepare` out of the same folder; the lock ends with the process, however that ends."""
    with open(work_folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                "Another prepare is writing to this folder.",
                where=str(work_folder.parent),
                remedy="Wait for it, or choose another --output.",
            ) from None
        except OSError:
            pass  # a network file system without locks
        yield


@contextlib.contextmanager
def _interruptible(console: Console) -> Iterator[None]:
    """SIGTERM works like Ctrl-C, and both say how to go on."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = None
    with contextlib.suppress(ValueError):  # not in the main thread: the caller's signals are its own
        before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        console.print("Interrupted. Finished units are kept: run the same command again to continue.")
        raise
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
