"""Reads the blocks of a data set: their tokens, and what an objective wants marked among them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from trainer.data.batch import Samples
from trainer.data.blocks import DOCUMENT_STARTS, Blocks
from trainer.data.dataset import ShardSet
from trainer.data.documents import DocumentBorders
from trainer.data.rows import row_index
from trainer.data.shard_parts import ShardParts
from trainer.data.token_marks import check_marked, unpack_stretches


def block_count(shards: ShardSet, samples: Samples) -> int:
    """Count the blocks of a data set as an objective sees them.

    Raises:
        DamagedError: as `row_index`, for rows of documents.
    """
    view = samples.view
    return len(row_index(shards, samples.seq_len)) if view.whole_documents else view.block_count(shards.tokens)


class BlockReader:
    """The blocks of one data set as an objective sees them.

    Raises:
        UserError: when the data set was prepared without a mark that the objective reads.
        DamagedError: as `row_index`, for rows of documents.
    """

    def __init__(self, shards: ShardSet, samples: Samples) -> None:
        self.shards, self.view, self._payload = shards, samples.view, samples.view.payload
        self._rows = row_index(shards, samples.seq_len) if samples.view.whole_documents else None
        self._readers = {mark: _reader_of(shards, mark) for mark in samples.marks}

    def read(self, blocks: NDArray[np.int64], partners: NDArray[np.int64] | None = None) -> Blocks:
        """Read blocks by number, int64 [B]; fastest when they ascend.

        Args:
            partners: int64 [B], of which block to read `Blocks.partner`, where the view has one. A block that is its
                own partner has one of no tokens.

        Raises:
            DamagedError: as `ShardSet.read` and `ShardParts`.
        """
        return self._read(blocks, partners, self.shards.read)

    def read_marks(self, blocks: NDArray[np.int64], partners: NDArray[np.int64] | None = None) -> Blocks:
        """Read the marks alone, which is little; the tokens are 0."""
        return self._read(blocks, partners, lambda starts, length: np.zeros((len(starts), length), self.shards.dtype))

    def advise(self, blocks: NDArray[np.int64], partners: NDArray[np.int64] | None = None) -> None:
        """Tell the kernel that these blocks (int64 [B], ascending), and such partners, will be read soon."""
        self.shards.advise(*self._stretches(blocks))
        if partners is not None:
            self.shards.advise(*self._partner_stretches(np.unique(partners)))

    def _read(
        self,
        blocks: NDArray[np.int64],
        partners: NDArray[np.int64] | None,
        read: Callable[[NDArray[np.int64], int], np.ndarray],
    ) -> Blocks:
        starts, length = self._stretches(blocks)
        found = self._blocks(blocks, starts, read(starts, length))
        assert (partners is not None) == self.view.partner
        if partners is None:
            return found
        starts, length = self._partner_stretches(partners)
        return found._replace(partner=self._partners(blocks, partners, starts, read(starts, length)))

    def _partner_stretches(self, partners: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
        """Find the stretches that hold partners and a block after each; at the end of the stream they begin earlier."""
        length = min(2 * self._payload, self.shards.tokens)
        return np.minimum(np.asarray(partners, np.int64) * self._payload, self.shards.tokens - length), length

    def _partners(
        self, blocks: NDArray[np.int64], partners: NDArray[np.int64], starts: NDArray[np.int64], tokens: np.ndarray
    ) -> Blocks:
        """Put marks beside the tokens of partners, and let them begin where they do and end where their block would."""
        first, length = np.asarray(partners, np.int64) * self._payload, tokens.shape[1]
        marked = {mark: reader.starts(starts, length) for mark, reader in self._readers.items()}
        lengths = np.minimum(2 * self._payload, self.shards.tokens - first)
        lengths[partners + 1 == blocks] = self._payload
        lengths[partners == blocks] = 0
        if length < 2 * self._payload or (first > starts).any():
            places = np.minimum(np.arange(2 * self._payload) + (first - starts)[:, None], length - 1)
            tokens, marked = _aligned(tokens, marked, places)
        return Blocks(tokens, marked, lengths)

    def _stretches(self, blocks: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
        """Find the stretches of the stream that blocks are of: the first token of each, and their length."""
        if self._rows is None:
            return np.asarray(blocks, np.int64) * self._payload, self._payload + self.view.lookahead
        length = min(self._payload + 1, self.shards.tokens)
        return np.minimum(self._rows.locate(blocks)[0], self.shards.tokens - length), length

    def _blocks(self, blocks: NDArray[np.int64], starts: NDArray[np.int64], tokens: np.ndarray) -> Blocks:
        """Put marks beside the tokens [B, length] of the stretches of blocks, and let rows begin where they do."""
        length = tokens.shape[1]
        marked = {mark: reader.starts(starts, length) for mark, reader in self._readers.items()}
        if self._rows is None:
            return Blocks(tokens, marked)
        first, lengths = self._rows.locate(blocks)
        # Those at the end of the stream were read from before their start.
        places = np.minimum(np.arange(self._payload + 1) + (first - starts)[:, None], length - 1)
        tokens, marked = _aligned(tokens, marked, places)
        marked[DOCUMENT_STARTS][:, 0] = True  # a row may begin with a later piece of a document
        return Blocks(tokens, marked, lengths, self._rows.cuts(blocks))


class MarkedTokens:
    """Which tokens of a data set carry a mark, looked up by their place in the stream."""

    def __init__(self, shards: ShardSet, mark: str) -> None:
        check_marked(shards.folder, shards.manifest, mark)
        self._shards, self._bits = shards, ShardParts(shards, mark, "u1")

    def starts(self, first: NDArray[np.int64], length: int) -> NDArray[np.bool_]:
        """Find which tokens of stretches of the stream are marked: [B, length]; `first` is int64 [B]."""
        if (within := self._shards.in_one_shard(first, length)) is not None:  # as those of a small batch mostly are
            shard, offsets = within
            return unpack_stretches(self._bits[shard], offsets, length)
        _, shards, offsets, lengths = self._shards.pieces(first, length).T
        places = np.cumsum(lengths) - lengths  # of the pieces in the flattened result
        found = np.empty(len(first) * length, np.bool_)
        for shard, count in sorted({*zip(shards.tolist(), lengths.tolist(), strict=True)}):
            here = np.flatnonzero((shards == shard) & (lengths == count))
            found[places[here][:, None] + np.arange(count)] = unpack_stretches(self._bits[shard], offsets[here], count)
        return found.reshape(len(first), length)


def _aligned(
    tokens: np.ndarray, marked: Mapping[str, NDArray[np.bool_]], places: NDArray[np.int64]
) -> tuple[np.ndarray, dict[str, NDArray[np.bool_]]]:
    """Take of each row, tokens and marks [B, n], what is at `places` [B, m] of it."""
    aligned = {mark: np.take_along_axis(each, places, axis=1) for mark, each in marked.items()}
    return np.take_along_axis(tokens, places, axis=1), aligned


def _reader_of(shards: ShardSet, mark: str) -> DocumentBorders | MarkedTokens:
    return DocumentBorders(shards) if mark == DOCUMENT_STARTS else MarkedTokens(shards, mark)
