"""Whole documents in rows: one sample a line, a dialogue, a text of a task.

A row shows documents one after the other, each as `begin … end`, as long as the next one fits; the rest is padding. A
document that is longer than a row is cut into pieces of seq_len − 2 tokens. Documents keep their order, so a row is a
stretch of the stream, and where it starts is a function of the data and of seq_len alone: what is called next-fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from trainer.data.dataset import ShardSet
from trainer.data.documents import unordered
from trainer.data.shard_parts import ShardParts

FRAME = 2  # a begin and an end token around each document
_START_BITS = np.uint64(48)
_START_MASK = np.uint64((1 << 48) - 1)


@dataclass(frozen=True)
class RowIndex:
    """The rows of a data set.

    Attributes:
        entries: uint64 [rows], of each the place of its first token in the stream and, in the upper 16 bits, how many
            tokens it shows. The separators between its documents count, the one after the last does not.
        documents: that the rows show; those without a token, and those that a quarantine cuts, are left out.
        cut: how many of them are longer than a row.
        positions: that they fill, with their begin and end tokens; the rest of the rows is padding.
    """

    entries: NDArray[np.uint64]
    documents: int
    cut: int
    positions: int

    def __len__(self) -> int:
        return len(self.entries)

    def locate(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Find where rows start in the stream, and how many tokens they show: int64 [B] each."""
        found = self.entries[rows]
        return (found & _START_MASK).astype(np.int64), (found >> _START_BITS).astype(np.int64)

    def cuts(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Tell whether rows begin, and whether they end, within a document that is cut: bool [B, 2].

        A piece of one that goes on fills its row, and the next row begins at its next token, without a separator.
        """
        return np.stack([self._goes_on(rows), self._goes_on(rows + 1)], axis=1)

    def _goes_on(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        inside = (rows > 0) & (rows < len(self))
        before, lengths = self.locate(np.where(inside, rows - 1, 0))
        return inside & (before + lengths == self.locate(np.where(inside, rows, 0))[0])


_indices: WeakKeyDictionary[ShardSet, dict[int, RowIndex]] = WeakKeyDictionary()


def row_index(shards: ShardSet, seq_len: int) -> RowIndex:
    """Lay the documents of a data set out in rows; once for an open data set.

    Only the `.doc` files are read.

    Raises:
        DamagedError: when one of them is not the one that the manifest records, or its offsets do not ascend.
    """
    known = _indices.setdefault(shards, {})
    if seq_len not in known:
        known[seq_len] = _build(shards, seq_len)
    return known[seq_len]


def _build(shards: ShardSet, seq_len: int) -> RowIndex:
    borders = ShardParts(shards, "doc", "<u8")  # token offsets of documents, then the shard's length
    parts, documents, cut, positions = [np.empty(0, np.uint64)], 0, 0, 0
    for shard, offset, tokens, place in shards.segments():
        starts = borders[shard].astype(np.int64)
        contents = np.diff(starts) - 1  # without the separator
        if len(contents) and contents.min() < 0:
            raise unordered(shards, shard)
        whole = (starts[:-1] >= offset) & (starts[1:] <= offset + tokens) & (contents > 0)
        runs = np.cumsum(~whole, dtype=np.int64)[whole]  # of documents that follow each other: a row is one stretch
        starts, contents = starts[:-1][whole] - offset + place, contents[whole]
        documents, cut = documents + len(contents), cut + int((contents > seq_len - FRAME).sum())
        starts, contents, runs = _cut_long(starts, contents, runs, seq_len - FRAME)
        positions += int((contents + FRAME).sum())
        first = fill_rows(contents + FRAME, runs, seq_len)
        last = np.append(first[1:], len(contents))[: len(first)] - 1
        lengths = starts[last] + contents[last] - starts[first]
        parts.append(starts[first].astype(np.uint64) | lengths.astype(np.uint64) << _START_BITS)
    return RowIndex(np.concatenate(parts), documents, cut, positions)


def _cut_long(
    starts: NDArray[np.int64], contents: NDArray[np.int64], runs: NDArray[np.int64], most: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Cut documents into pieces of at most `most` tokens: where each piece starts, its tokens, and its run."""
    counts = -(-contents // most)
    document = np.repeat(np.arange(len(contents)), counts)
    distance = (np.arange(len(document)) - (np.cumsum(counts) - counts)[document]) * most
    return starts[document] + distance, np.minimum(contents[document] - distance, most), runs[document]


def fill_rows(lengths: NDArray[np.int64], runs: NDArray[np.int64], seq_len: int) -> NDArray[np.int64]:
    """Find which pieces begin a row, when each row takes as many as fit: int64, ascending, the first is 0.

    The piece after a row that begins with i is next[i], so rows begin with 0, next[0], next[next[0]] …; each step of
    the loop knows twice as many of them.

    Args:
        lengths: int64 [n], positions of each piece, at most `seq_len`.
        runs: int64 [n], ascending; a row holds pieces of one run.
    """
    ends = np.concatenate([[0], np.cumsum(lengths)])
    jump = np.searchsorted(ends, ends + seq_len, side="right") - 1
    jump[:-1] = np.minimum(jump[:-1], np.searchsorted(runs, runs, side="right"))
    first = np.zeros(1, np.int64)
    while first[-1] < len(lengths):
        first = np.concatenate([first, jump[first]])
        jump = jump[jump]
    return first[first < len(lengths)]
