"""One worker process: units in, shards and unit records out."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path

import numpy as np
import xxhash

from tools.prepare.bad_documents import BadDocument, Losses
from tools.prepare.encode import BATCH_CHARACTERS, BATCH_DOCUMENTS, Encoder
from tools.prepare.option_names import OptionNames
from tools.prepare.pieces import TextSettings
from tools.prepare.plan import Unit
from tools.prepare.readers import read_documents
from tools.prepare.segment import StartSettings
from tools.prepare.special_tokens import NONE_SPECIAL, SPECIAL_IN_TEXT, SpecialTokens, TokenTally
from trainer.data.manifest import ShardEntry, read_entry
from trainer.data.shard_writer import ShardWriter, remove_shard
from trainer.errors import MaskwrightError, UserError
from trainer.runtime.files import replace_synced, sync_folder, unique_name

REPORT_SECONDS = 0.5
_SPLIT_SEED = 0x6D61736B  # fixed: a document is on the same side in every data set
HASHES = 2**64
"""How many different hashes of a document there are."""


@dataclass(frozen=True)
class WorkSettings:
    """What is the same for all units. `splits` maps a split to its folder: {"train": …} or with "validation"."""

    work_folder: str
    splits: dict[str, str]
    tokenizer_file: str
    dtype: str
    separator_id: int
    validation_fraction: float
    reading: TextSettings
    starts: StartSettings = field(default_factory=StartSettings)
    special: SpecialTokens = NONE_SPECIAL


@dataclass
class SplitRecord:
    """What a unit added to a split; `entry` is None when that is nothing."""

    entry: ShardEntry | None = None
    text_bytes: int = 0
    longest_document_tokens: int = 0


@dataclass
class UnitRecord:
    """A finished unit, as `.prepare/unit-NNNNN.json` holds it. Written last: with it, the shards are whole."""

    identity: str
    empty_documents: int = 0
    losses: Losses = field(default_factory=Losses)
    splits: dict[str, SplitRecord] = field(default_factory=dict)
    tally: TokenTally = field(default_factory=TokenTally)


def record_path(work_folder: str | Path, number: int) -> Path:
    return Path(work_folder) / f"unit-{number:05d}.json"


def read_unit_record(work_folder: str | Path, number: int) -> UnitRecord | None:
    """Read the record of a unit; None when there is none or it cannot be read."""
    try:
        raw = json.loads(record_path(work_folder, number).read_text())
        losses = raw["losses"] if "losses" in raw else {"refused": raw["refused_documents"]}  # of earlier versions
        tally = TokenTally(**raw.get("tally", {}))  # which have none
        record = UnitRecord(raw["identity"], raw["empty_documents"], Losses(**losses), tally=tally)
        for name, split in raw["splits"].items():
            entry = split.pop("entry")
            record.splits[name] = SplitRecord(read_entry(entry) if entry else None, **split)
        return record
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def choose_split(raw: bytes, validation_fraction: float) -> str:
    """Choose "train" or "validation", by the hash of the UTF-8 text: a repeated document is never on both sides."""
    return "validation" if hash_document(raw) < validation_fraction * HASHES else "train"


def hash_document(raw: bytes) -> int:
    """Hash the UTF-8 text of a document, below HASHES, for its split."""
    return xxhash.xxh3_64_intdigest(raw, seed=_SPLIT_SEED)


def write_unit(
    unit: Unit, identity: str, settings: WorkSettings, encoder: Encoder, report: Callable[[int, int], None]
) -> None:
    """Tokenize a unit into one shard for each split, then write its record.

    Args:
        report: called now and then with (bytes read, tokens written) of this unit so far.
    """
    record = UnitRecord(identity, splits={name: SplitRecord() for name in settings.splits})
    writers: dict[str, ShardWriter] = {}
    tokens, reported = 0, time.monotonic()
    for texts, position in _batches(unit, settings, record):
        for text, encoded in zip(texts, encoder.encode(texts, record.tally), strict=True):
            raw = text.encode()
            name = choose_split(raw, settings.validation_fraction) if settings.validation_fraction else "train"
            if name not in writers:
                writers[name] = ShardWriter(
                    settings.splits[name],
                    unit.shard,
                    np.dtype(settings.dtype),
                    settings.separator_id,
                    tuple(settings.starts.by_mark),
                )
            writers[name].add_document(encoded.ids, encoded.starts)
            split = record.splits[name]
            split.text_bytes += len(raw)
            split.longest_document_tokens = max(split.longest_document_tokens, len(encoded.ids))
            tokens += len(encoded.ids) + 1
        if time.monotonic() - reported > REPORT_SECONDS:
            report(position, tokens)
            reported = time.monotonic()
    path = record_path(settings.work_folder, unit.number)
    if path.exists():  # of another job: it must not vouch for the shards that now take the names
        path.unlink(missing_ok=True)
        sync_folder(path.parent)
    for name, folder in settings.splits.items():
        if name in writers:
            record.splits[name].entry = writers[name].close()
        else:
            remove_shard(Path(folder), unit.shard)
    replace_synced(path, json.dumps(asdict(record)).encode(), unique_name(path))
    report(unit.size, tokens)


def _batches(unit: Unit, settings: WorkSettings, record: UnitRecord) -> Iterator[tuple[list[str], int]]:
    """Read batches of documents with the bytes of the unit consumed; count the documents that are left out."""
    texts: list[str] = []
    characters, before, position = 0, 0, 0
    for piece in unit.pieces:
        for text, consumed in read_documents(piece, settings.reading, record.losses):
            if not text or text.isspace():
                record.empty_documents += 1
                continue
            if (token := settings.special.refused(text)) is not None:
                bad = _special_in_text(token, text, piece.file.path, settings.reading.names)
                if settings.reading.on_bad_document != "skip":
                    raise bad.explain()
                record.losses.refuse(bad)
                continue
            texts.append(text)
            characters += len(text)
            position = before + consumed
            if characters >= BATCH_CHARACTERS or len(texts) >= BATCH_DOCUMENTS:
                yield texts, position
                texts, characters = [], 0
        before += piece.size
    if texts:
        yield texts, position


def _special_in_text(token: str, text: str, path: str, names: OptionNames) -> BadDocument:
    place = text.index(token)
    around = " ".join(text[max(0, place - 30) : place + len(token) + 30].split())
    error = UserError(
        f"A document holds the special token '{token}': …{around}…",
        where=path,
        remedy=f"Leave such documents out with {names('on-bad-document', 'skip')}, or take the token for text or for "
        f"its id: {names('special-in-text', 'text')}, or ids.",
    )
    return BadDocument(SPECIAL_IN_TEXT, lambda: error, len(text.encode()))


def work(connection: Connection, settings: WorkSettings) -> None:
    """Run as the process's main function: take (unit, identity) until None, send progress, done and failed messages."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, BrokenPipeError):
        unit = None
        try:
            encoder = Encoder(
                settings.tokenizer_file, np.dtype(settings.dtype), settings.starts.segmenters(), settings.special
            )
            while (task := connection.recv()) is not None:
                unit, identity = task

                def report(size: int, tokens: int, number: int = unit.number) -> None:
                    connection.send(("progress", (number, size, tokens)))

                write_unit(unit, identity, settings, encoder, report)
                connection.send(("done", unit.number))
        except (EOFError, BrokenPipeError):
            raise
        except Exception as error:
            connection.send(("failed", _portable(error, settings.work_folder, unit)))


def _portable(error: Exception, folder: str, unit: Unit | None) -> Exception:
    """Make the error one that the parent can receive and show."""
    if isinstance(error, MaskwrightError):
        return error
    output = str(Path(folder).parent)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        remedy = "Free some space and run the same command again to continue."
        return UserError("The disk is full.", where=output, remedy=remedy)
    if isinstance(error, FileNotFoundError) and str(error.filename).startswith(output):
        remedy = "Let one prepare work in a folder at a time; run the same command again to continue."
        return UserError("A file that was being written has been removed.", where=str(error.filename), remedy=remedy)
    if isinstance(error, MemoryError) and unit is not None:
        remedy = "Use fewer --workers, or cut a document of gigabytes. Run the same command again to continue."
        return UserError("Not enough memory for a document.", where=unit.describe(), remedy=remedy)
    note = "In a worker process:\n" + traceback.format_exc()
    try:
        error = pickle.loads(pickle.dumps(error))
    except Exception:  # an exception class that does not survive pickling
        error = RuntimeError(repr(error))
    error.add_note(note)
    return error


def _exit_with_parent() -> None:
    """End this process when its parent has ended: a killed parent cannot end its workers."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
