"""The common view of imported layouts: documents of token ids, read in chunks of bounded size."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from trainer.errors import DamagedError, UserError

CHUNK_TOKENS = 1 << 22
_WINDOW_DOCUMENTS = 1 << 16  # of an index that may be larger than memory


@dataclass(frozen=True)
class Chunk:
    """Consecutive whole documents, each of one sequence or (Megatron) of several.

    Attributes:
        first: number of the first document in its source, from 0.
        tokens: [n], ids as they are stored.
        sequence_ends: int64 [sequences], in tokens from the start of the chunk.
        document_ends: int64 [documents], in sequences from the start of the chunk.
    """

    first: int
    tokens: np.ndarray
    sequence_ends: np.ndarray
    document_ends: np.ndarray


class TokenSource(ABC):
    """One thing to import: a token file with its index, or a folder.

    Attributes:
        path: what messages name.
        name: `path` relative to what the user gave.
        documents: their number.
        tokens: their number as they are stored; of a folder of `datasets` an estimate.
        size, mtime_ns: of its files together; with the name they are its identity.
        notes: what the user should know of this source before it is read.
    """

    format: ClassVar[str]
    tokens: int

    def __init__(self, path: str, name: str, files: list[str], documents: int) -> None:
        self.path, self.name, self.documents = path, name, documents
        self.size = sum(os.path.getsize(file) for file in files)
        self.mtime_ns = max(os.stat(file).st_mtime_ns for file in files)
        self.notes: list[str] = []

    @abstractmethod
    def cut(self, limit: int) -> list[tuple[int, int]]:
        """Cut all documents into ranges [first, last) of about `limit` tokens: a pure function of the source."""

    @abstractmethod
    def chunks(self, first: int, last: int) -> Iterator[Chunk]:
        """Read documents [first, last), in order. One document is never divided, however long it is."""


class FlatFile(TokenSource):
    """A file of nothing but tokens, with an index of where its documents start."""

    def __init__(self, name: str, token_file: str, others: list[str], dtype: np.dtype, documents: int) -> None:
        super().__init__(token_file, name, [token_file, *others], documents)
        self.dtype = dtype
        self.tokens = os.path.getsize(token_file) // dtype.itemsize

    @abstractmethod
    def document_starts(self, first: int, last: int) -> np.ndarray:
        """Find where documents first … last start, in tokens: int64 [last − first + 1]; the last one is an end."""

    def sequence_ends(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Find the ends of the sequences of documents [first, last) in tokens of the file, and which end a document.

        Here a document is one sequence.
        """
        return self.document_starts(first, last)[1:], np.arange(1, last - first + 1)

    def cut(self, limit: int) -> list[tuple[int, int]]:
        return list(self._runs(0, self.documents, limit))

    def chunks(self, first: int, last: int) -> Iterator[Chunk]:
        for start, end in self._runs(first, last, CHUNK_TOKENS):
            low, high = (int(self.document_starts(at, at)[0]) for at in (start, end))
            count, offset = high - low, low * self.dtype.itemsize
            tokens = np.fromfile(self.path, self.dtype, count, offset=offset)
            if len(tokens) != count:
                raise does_not_fit(self.path, "it became shorter while it was read")
            ends, documents = self.sequence_ends(start, end)
            yield Chunk(start, tokens, ends - low, documents)

    def _runs(self, first: int, last: int, limit: int) -> Iterator[tuple[int, int]]:
        """Cut documents [first, last) into runs of at most `limit` tokens, or of one longer document."""
        run, position = first, first
        base = int(self.document_starts(first, first)[0])
        while position < last:
            stop = min(last, position + _WINDOW_DOCUMENTS)
            starts = self.document_starts(position, stop)
            while (fits := position + int(np.searchsorted(starts[1:], base + limit, "right"))) < stop:
                end = max(fits, run + 1)
                yield run, end
                run, base = end, int(starts[end - position])
                if end == stop:
                    break
            position = stop
        if run < last:
            yield run, last


def does_not_fit(path: str, problem: str) -> DamagedError:
    """Make the error for an index and a token file that are not of each other, or of which one is cut short."""
    return DamagedError(
        f"Cannot import '{os.path.basename(path)}': {problem}.",
        where=path,
        remedy="Copy the token file and its index again, or write them again.",
    )


def not_of_the_format(path: str, format: str, problem: str) -> UserError:
    return UserError(
        f"Cannot read '{os.path.basename(path)}' as {format}: {problem}.",
        where=path,
        remedy="Correct --input, or see --from.",
    )


def in_windows(length: int) -> Iterator[slice]:
    """Cut an index of `length` entries into slices that cover it."""
    for start in range(0, length, _WINDOW_DOCUMENTS):
        yield slice(start, min(length, start + _WINDOW_DOCUMENTS))
