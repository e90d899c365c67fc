"""`maskwright data import`, from the arguments to the manifests."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from rich.console import Console

from tools.import_tokens.clean import Cleaner, Counts
from tools.import_tokens.convert import TokenConversion
from tools.import_tokens.datatrove import DatatroveFile
from tools.import_tokens.find import FoundTokens, find_sources
from tools.import_tokens.output import Output
from tools.import_tokens.write import ShardRecord, ShardSettings
from tools.prepare.job import TOKENIZER_FOLDER
from tools.prepare.progress import ReadProgress
from tools.prepare.summary import human_bytes
from trainer.data.manifest import Manifest, token_dtype
from trainer.data.shard_checks import document_starts
from trainer.data.tokenizer import Vocabulary, load_tokenizer, read_vocabulary
from trainer.errors import UserError
from trainer.runtime.files import file_sums
from trainer.runtime.paths import user_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SHOWN_TOKENS = 24


@dataclass(frozen=True)
class ImportSummary:
    """The result of an import: the manifest of each split, how each shard came to be, and what was counted."""

    output: Path
    manifests: dict[str, Manifest]
    linked: int
    counts: Counts
    already_imported: bool

    @classmethod
    def of(cls, output: Path, manifests: dict[str, Manifest], records: Sequence[ShardRecord]) -> ImportSummary:
        counts = Counts()
        for record in records:
            counts.add(record.counts)
        linked = sum(bool(record.link) for record in records)
        return cls(output, manifests, linked, counts, already_imported=False)

    @property
    def documents(self) -> int:
        return sum(manifest.documents for manifest in self.manifests.values())

    @property
    def tokens(self) -> int:
        return sum(manifest.tokens for manifest in self.manifests.values())


def import_tokens(
    inputs: Sequence[str],
    tokenizer: str,
    output: str,
    format: str = "auto",
    field: str = "input_ids",
    validation_fraction: float = 0.0,
    link: bool | None = None,
    strip: Sequence[str] = (),
    special_inside: str = "refuse",
    console: Console | None = None,
) -> ImportSummary:
    """Make a data set of tokens that Megatron-LM, datatrove or `datasets` stored.

    A token file that holds exactly what a shard would (each document's content, one separator, the same bytes a
    token) is linked; any other is converted in a stream. The tokens are the same either way. Shards that an
    interrupted run finished are kept.

    Args:
        inputs: token files, prefixes, globs, folders.
        tokenizer: folder or hub name of the tokenizer that the tokens are of.
        format: "auto", "megatron", "datatrove" or "datasets".
        field: the column of ids, for "datasets".
        validation_fraction: share of the documents held out, chosen by the hash of their ids; above 0 the data sets
            are `output/train` and `output/validation`.
        link: None links where that is possible and converts the rest; True refuses to convert, and makes a
            symbolic link where the file system refuses a hard one; False converts all.
        strip: tokens to take off the ends of documents besides the tokenizer's begin, end and pad tokens.
        special_inside: "refuse" a document with a special token inside, or "skip" it.

    Raises:
        UserError: for any mistake in the arguments or the input, and when `output` holds something else.
        DamagedError: for an index and a token file that do not fit each other.
    """
    console = console or Console(markup=False)
    _check_link(link, validation_fraction)
    loaded = load_tokenizer(tokenizer)
    vocabulary = read_vocabulary(loaded, tokenizer)
    cleaner = Cleaner(loaded, vocabulary, strip, special_inside == "skip")
    found = find_sources(inputs, format, field)
    settings = _settings(found, field, validation_fraction, strip, special_inside)
    newest = max(source.mtime_ns for source in found.sources)
    place = Output(user_path(output, "--output"), settings, vocabulary.sha256, newest)
    finished = place.finished()
    if finished is not None:
        _say(console, f"Already imported: {place.folder}")
        return ImportSummary(place.folder, finished, 0, Counts(), already_imported=True)
    notes = [_tokenizer_note(found, tokenizer, loaded), *(note for source in found.sources for note in source.notes)]
    with place.claimed(console):
        place.save_tokenizer(loaded)
        conversion = _write_shards(found, place, cleaner, vocabulary, link, console)
        manifests = _manifests(conversion.records, place, vocabulary, found)
        place.commit(manifests)
    summary = ImportSummary.of(place.folder, manifests, conversion.records)
    notes += [*_describe_conversion(conversion), *cleaner.describe(summary.counts)]
    _print_summary(summary, [note for note in notes if note], place, loaded, console)
    return summary


def _check_link(link: bool | None, validation_fraction: float) -> None:
    if link and validation_fraction:
        raise UserError(
            "With --validation-fraction the documents go to two data sets, so their file cannot be linked.",
            where="--link",
            remedy="Leave out one of the two.",
        )


def _settings(
    found: FoundTokens, field: str, validation_fraction: float, strip: Sequence[str], special_inside: str
) -> dict[str, Any]:
    """Collect what the manifest records of the call; `inputs` is a hash of the names and sizes of all files."""
    listing = repr([(source.name, source.size, source.documents) for source in found.sources])
    return {
        "format": found.format,
        "field": field if found.format == "datasets" else None,
        "validation_fraction": validation_fraction,
        "inputs": xxhash.xxh3_128_hexdigest(listing.encode()),
        "strip": sorted(strip),
        "special_inside": special_inside,
    }


def _tokenizer_note(found: FoundTokens, given: str, tokenizer: PreTrainedTokenizerFast) -> str:
    """Compare the tokenizer that datatrove's metadata names with the one given, as far as that can be done.

    Raises:
        UserError: when it is known to be another one.
    """
    names = {source.tokenizer_name: source for source in found.sources if isinstance(source, DatatroveFile)}
    named = sorted(name for name in names if name)
    if len(named) > 1:
        raise UserError(
            f"The files were tokenized with different tokenizers: {', '.join(named)}.",
            where=names[named[0]].path + ".metadata",
            remedy="Import those of one tokenizer at a time.",
        )
    if not named or named[0] == given:
        return ""
    if os.path.isfile(named[0]):
        from tokenizers import Tokenizer

        if Tokenizer.from_file(named[0]).get_vocab() != tokenizer.get_vocab():
            raise UserError(
                f"The files were tokenized with '{named[0]}', whose vocabulary is not that of '{given}'.",
                where=names[named[0]].path + ".metadata",
                remedy="Give the tokenizer that the data were tokenized with.",
            )
        return ""
    return f"The files were tokenized with '{named[0]}'; it is not checked that '{given}' is the same."


def _write_shards(
    found: FoundTokens, place: Output, cleaner: Cleaner, vocabulary: Vocabulary, link: bool | None, console: Console
) -> TokenConversion:
    files = f"{len(found.sources):,} source{'s' if len(found.sources) > 1 else ''}"
    _say(console, f"Input: {files}, {human_bytes(found.size)}, format {found.format}.")
    settings = ShardSettings(
        place.work_folder,
        place.folders,
        token_dtype(vocabulary.size),
        vocabulary.separator_id,
        place.settings["validation_fraction"],
    )
    # Shards are known by their own documents, so that an import of more files keeps those of the first.
    identity = {**place.settings, "inputs": None, "tokenizer": vocabulary.sha256}
    with ReadProgress(console, "Importing", found.size) as progress:
        conversion = TokenConversion(cleaner, settings, link, identity, progress.update)
        for source in found.sources:
            conversion.add(source)
    return conversion


def _manifests(
    records: Sequence[ShardRecord], place: Output, vocabulary: Vocabulary, found: FoundTokens
) -> dict[str, Manifest]:
    """Make the manifest of each split.

    Raises:
        UserError: when a split would have no document.
    """
    manifests = {}
    for name in place.folders:
        parts = [record.splits[name] for record in records]
        entries = tuple(part.entry for part in parts if part.entry)
        if not entries:
            total = sum(record.counts.documents for record in records)
            problem = f"Of {total:,} documents none falls into the {name} split." if total else _no_documents(records)
            raise UserError(problem, where="--input", remedy="Give other files, or another --validation-fraction.")
        manifests[name] = Manifest(
            dtype=token_dtype(vocabulary.size).str,
            tokenizer_sha256=vocabulary.sha256,
            vocabulary_size=vocabulary.size,
            separator_id=vocabulary.separator_id,
            tokens=sum(entry.tokens for entry in entries),
            documents=sum(entry.documents for entry in entries),
            shards=entries,
            sources=found.described,
            settings=place.settings,
            statistics={  # text_bytes is not known
                "longest_document_tokens": max(part.longest_document_tokens for part in parts),
                "empty_documents_in_input": sum(record.counts.empty for record in records),
                "skipped_documents_in_input": sum(record.counts.skipped for record in records),
            },
            written_by=f"maskwright {version('maskwright')}",
            tokenizer_files=file_sums(place.folder / TOKENIZER_FOLDER),
        )
    return manifests


def _no_documents(records: Sequence[ShardRecord]) -> str:
    empty, skipped = (sum(getattr(record.counts, name) for record in records) for name in ("empty", "skipped"))
    return f"The input holds no documents to import: {empty:,} are empty, {skipped:,} hold a special token inside."


def _describe_conversion(conversion: TokenConversion) -> list[str]:
    """Say which source was not linked, and why, and how many more."""
    if not conversion.converted:
        return []
    name, reason = conversion.converted[0]
    more = f" So were {len(conversion.converted) - 1:,} more." if len(conversion.converted) > 1 else ""
    return [f"'{name}' was converted, not linked: {reason}.{more}"]


def _print_summary(
    summary: ImportSummary, notes: list[str], place: Output, tokenizer: PreTrainedTokenizerFast, console: Console
) -> None:
    for name, manifest in summary.manifests.items():
        links = f", {summary.linked:,} of them linked" if summary.linked else ""
        _say(
            console,
            f"{place.folders[name]}: {manifest.documents:,} documents, the longest of "
            f"{manifest.statistics.get('longest_document_tokens', 0):,} tokens; {manifest.tokens:,} tokens in "
            f"{len(manifest.shards):,} shard(s){links}",
        )
    for note in notes:
        _say(console, note)
    text = tokenizer.decode(_first_ids(place.folders["train"], summary.manifests["train"]))
    _say(console, f"The first document begins: {text!r}. If that is no text, the tokenizer is another one.")


def _first_ids(folder: Path, manifest: Manifest) -> list[int]:
    shard = manifest.shards[0]
    length = min(int(document_starts(folder, shard)[1]) - 1, _SHOWN_TOKENS)
    return np.fromfile(folder / f"{shard.name}.tok", manifest.dtype, length).tolist()


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)
