"""Reads the blocks of a data set: their tokens, and what an objective wants marked among them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trainer.data.batch import Samples
from trainer.data.blocks import DOCUMENT_STARTS, Blocks
from trainer.data.dataset import ShardSet
from trainer.data.documents import DocumentBorders
from trainer.data.shard_parts import ShardParts
from trainer.data.token_marks import check_marked, unpack_starts


class BlockReader:
    """The blocks of one data set as an objective sees them.

    Raises:
        UserError: when the data set was prepared without a mark that the objective reads.
    """

    def __init__(self, shards: ShardSet, samples: Samples) -> None:
        self.shards, self.payload = shards, samples.view.payload
        self._readers = {mark: _reader_of(shards, mark) for mark in samples.marks}

    def read(self, blocks: NDArray[np.int64]) -> Blocks:
        """Read blocks by number, int64 [B]; fastest when they ascend.

        Raises:
            DamagedError: as `ShardSet.read_blocks` and `ShardParts`.
        """
        starts = {mark: reader.starts(blocks, self.payload) for mark, reader in self._readers.items()}
        return Blocks(self.shards.read_blocks(blocks, self.payload), starts)


class MarkedTokens:
    """Which tokens of a data set carry a mark, looked up by block."""

    def __init__(self, shards: ShardSet, mark: str) -> None:
        check_marked(shards.folder, shards.manifest, mark)
        self._shards, self._bits = shards, ShardParts(shards, mark, "u1")

    def starts(self, blocks: NDArray[np.int64], payload: int) -> NDArray[np.bool_]:
        """Find which tokens of blocks are marked: [B, payload]."""
        _, shards, offsets, lengths = self._shards.pieces(blocks, payload).T
        pieces = zip(shards.tolist(), offsets.tolist(), (offsets + lengths).tolist(), strict=True)
        bits = [unpack_starts(self._bits[shard], start, stop) for shard, start, stop in pieces]
        return np.concatenate(bits).reshape(len(blocks), payload)


def _reader_of(shards: ShardSet, mark: str) -> DocumentBorders | MarkedTokens:
    return DocumentBorders(shards) if mark == DOCUMENT_STARTS else MarkedTokens(shards, mark)
