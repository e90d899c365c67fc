"""The text that a tokenizer is trained on: the documents that `prepare` reads, as often as a trainer asks for them."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Self

from tokenizers.normalizers import Normalizer

from tools.prepare.bad_documents import Losses
from tools.prepare.pieces import Piece, TextSettings
from tools.prepare.progress import ReadProgress
from tools.prepare.readers import read_documents

# A trainer goes through a whole word for each merge within it: the time grows with the square of the longest one.
LONGEST_WORD = 2000  # characters
_LONG_RUN = re.compile(rf"(?<!\S)\S{{{LONGEST_WORD + 1},}}|(?<!\s)\s{{{LONGEST_WORD + 1},}}")
_TEXT_A_STEP = 1 << 16  # characters


class TrainingText:
    """Documents one after another; a new pass each time `texts` or `count_characters` is called.

    Attributes:
        losses: what the last pass left out.
        cut_words: how many words of the last pass were cut because they were longer than LONGEST_WORD.
    """

    def __init__(self, pieces: Sequence[Piece], reading: TextSettings, progress: ReadProgress) -> None:
        self._pieces, self._reading, self._progress = pieces, reading, progress
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
        before = since = 0
        for piece in self._pieces:
            for text, position in read_documents(piece, self._reading, self.losses):
                if self._cancel is not None and self._cancel.is_set():
                    raise KeyboardInterrupt
                yield text
                since += len(text)
                if since >= _TEXT_A_STEP:
                    self._progress.update(before + position)
                    since = 0
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
