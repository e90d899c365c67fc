"""The text that a tokenizer is trained on: the documents that `prepare` reads, as often as a trainer asks for them."""

from __future__ import annotations

import re
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from rich.console import Console
from tokenizers.normalizers import Normalizer

from tools.prepare.bad_documents import Losses
from tools.prepare.csv_rows import check_delimiter
from tools.prepare.hints import input_notes
from tools.prepare.inputs import find_inputs, resolve_documents
from tools.prepare.job import check_on_bad_document
from tools.prepare.option_names import COMMAND_LINE
from tools.prepare.pieces import Piece, TextSettings
from tools.prepare.plan import plan_units
from tools.prepare.progress import ReadProgress
from tools.prepare.readers import read_documents
from tools.prepare.summary import describe_refused, human_bytes, say
from trainer.errors import UserError

# A trainer goes through a whole word for each merge within it: the time grows with the square of the longest one.
LONGEST_WORD = 2000  # characters
_LONG_RUN = re.compile(rf"(?<!\S)\S{{{LONGEST_WORD + 1},}}|(?<!\s)\s{{{LONGEST_WORD + 1},}}")
_TEXT_A_STEP = 1 << 16  # characters


@dataclass(frozen=True)
class ReadOptions:
    """How the input is read.

    Attributes:
        format, field, documents, delimiter, on_bad_document: as in `tools.prepare.options.PrepareOptions`.
        sample: bytes of the files to read at most, evenly over all of them; None reads all.
    """

    format: str = "auto"
    field: str = "text"
    documents: str | None = None
    delimiter: str | None = None
    on_bad_document: str = "stop"
    sample: int | None = None


class TrainingText:
    """Documents one after another; a new pass each time `texts` or `count_characters` is called.

    Args:
        share: of the bytes of each piece that is read, from its beginning on, and whole documents; of small pieces some
            are passed over.

    Attributes:
        losses: what the last pass left out.
        cut_words: how many words of the last pass were cut because they were longer than LONGEST_WORD.
    """

    def __init__(
        self, pieces: Sequence[Piece], reading: TextSettings, progress: ReadProgress, share: float = 1.0
    ) -> None:
        self._pieces, self._reading, self._progress, self._share = pieces, reading, progress, share
        self._cancel: threading.Event | None = None
        self._size = sum(piece.size for piece in pieces)
        self._read_at: float | None = None  # when the last pass was over
        self.losses, self.cut_words = Losses(), 0

    def until(self, cancel: threading.Event) -> Self:
        """Let a pass end when `cancel` is set, from now on; return itself."""
        self._cancel = cancel
        return self

    def texts(self, normalizer: Normalizer | None = None, alphabet: set[str] | None = None) -> Iterator[str]:
        """Read all documents, long words cut; with a normalizer normalised, with blanks for what is not in `alphabet`.

        Raises:
            KeyboardInterrupt: when cancelled.
        """
        for text in self._documents():
            if normalizer is not None:
                text = normalizer.normalize_str(text)
            if alphabet is not None:
                text = text.translate({ord(character): " " for character in set(text) - alphabet})
            yield from self._cut(text)

    def count_characters(self) -> Counter[str]:
        """Count the characters of all documents, and one line end between two that were lines of a text file.

        So the line end is known to a tokenizer of text that `prepare` cuts in another way.

        Raises:
            KeyboardInterrupt: when cancelled.
        """
        counts: Counter[str] = Counter()
        seams = -1
        for text in self._documents():
            counts.update(text)
            seams += 1
        if seams > 0 and self._reading.format == "text" and self._reading.documents != "file":
            counts["\n"] += seams
        return counts

    def _documents(self) -> Iterator[str]:
        self.losses, self.cut_words, self._read_at = Losses(), 0, None
        before, since, due = 0, 0, 0.0
        for piece in self._pieces:
            due += self._share * piece.size
            position = 0
            for text, position in (
                read_documents(piece, self._reading, self.losses) if due > 0 or self._share == 1 else ()
            ):
                if self._cancel is not None and self._cancel.is_set():
                    raise KeyboardInterrupt
                yield text
                since += len(text)
                if since >= _TEXT_A_STEP:
                    self._progress.update(before + position)
                    since = 0
                if self._share < 1 and position >= due:
                    break
            due -= position
            before += piece.size
        self._read_at = time.monotonic()

    def tick(self) -> None:
        """Say that a trainer is at work on what it has read."""
        if self._read_at is not None:
            seconds = time.monotonic() - self._read_at
            self._progress.show(self._size, f"all read, finding pieces of words for {seconds:,.0f} s")

    def _cut(self, text: str) -> Iterator[str]:
        """Cut a text within its long runs of letters or blanks."""
        begin = 0
        if len(text) > LONGEST_WORD:
            for run in _LONG_RUN.finditer(text):
                self.cut_words += 1
                for cut in range(run.start() + LONGEST_WORD, run.end(), LONGEST_WORD):
                    yield text[begin:cut]
                    begin = cut
        yield text[begin:]


def _share(sample: int | None, size: int) -> float:
    if sample is not None and sample < 1:
        raise UserError("A sample of no bytes.", where="--sample", remedy="Give a size such as 500MB or 10GB.")
    if sample is not None and not size:
        raise UserError(
            "How large the input is cannot be told, so no share of it can be read.",
            where="--sample",
            remedy="Leave it out, or give files.",
        )
    return 1.0 if sample is None else min(1.0, sample / size)


@contextmanager
def opened_text(
    inputs: Sequence[str], options: ReadOptions, output: Path, console: Console, doing: str = "Reading"
) -> Iterator[TrainingText]:
    """Find the inputs and open their text; at the end what was left out is said.

    Args:
        output: a folder that is not searched.
        doing: what is shown beside the progress.

    Raises:
        UserError: for a mistake in the options or the input.
    """
    check_on_bad_document(options.on_bad_document, COMMAND_LINE)
    found = find_inputs(inputs, options.format, COMMAND_LINE, [output])
    documents = resolve_documents(options.documents, found.format)
    delimiter = check_delimiter(options.delimiter, found.format, COMMAND_LINE)
    for line in input_notes(found, documents, COMMAND_LINE):
        say(console, line)
    share = _share(options.sample, found.size)
    if share < 1:
        total = human_bytes(found.size)
        say(console, f"A sample of about {human_bytes(round(share * found.size))} of {total}, from all over the input.")
    with tempfile.TemporaryDirectory() as scratch, ReadProgress(console, doing, found.size) as progress:
        reading = TextSettings(found.format, documents, options.field, scratch, delimiter, options.on_bad_document)
        pieces = [piece for unit in plan_units(found, documents) for piece in unit.pieces]
        text = TrainingText(pieces, reading, progress, share)
        yield text
    if text.cut_words:
        say(console, f"Note: {text.cut_words:,} words of more than {LONGEST_WORD:,} characters were cut.")
    if text.losses.refused:
        say(console, f"Left out: {describe_refused(text.losses.refused)}.")
