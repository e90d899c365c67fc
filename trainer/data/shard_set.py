"""A data set opened for reading: blocks of tokens by number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.shards import check_sizes, read_manifest


class ShardSet:
    """A data set opened for reading: blocks of tokens by number.

    Files are mapped on first use; opening checks their sizes, not their content (`verify_shard` does).
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(folder)
        self.dtype = np.dtype(self.manifest.dtype)
        sizes = [entry.tokens for entry in self.manifest.shards]
        self._ends = np.cumsum(sizes, dtype=np.int64) if sizes else np.zeros(0, np.int64)
        self._maps: dict[int, np.ndarray] = {}
        for entry in self.manifest.shards:
            check_sizes(self.folder, entry)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # a worker maps the files itself

    @property
    def tokens(self) -> int:
        return self.manifest.tokens

    def block_count(self, payload: int) -> int:
        """Whole blocks of `payload` tokens; the tail that fills none is never read."""
        return self.tokens // payload

    def read_blocks(self, blocks: np.ndarray, payload: int) -> np.ndarray:
        """Gather blocks.

        Args:
            blocks: int64 [B], block numbers below `block_count(payload)`.

        Returns:
            [B, payload] in the stored dtype.
        """
        out = np.empty((len(blocks), payload), self.dtype)
        starts = np.asarray(blocks, np.int64) * payload
        shards = np.searchsorted(self._ends, starts, side="right")
        for row, (start, shard) in enumerate(zip(starts.tolist(), shards.tolist(), strict=True)):
            offset = start - (int(self._ends[shard]) - self.manifest.shards[shard].tokens)
            piece = self._tokens_of(shard)[offset : offset + payload]
            out[row, : len(piece)] = piece
            filled = len(piece)
            while filled < payload:  # a block that crosses into the next shards
                shard += 1
                piece = self._tokens_of(shard)[: payload - filled]
                out[row, filled : filled + len(piece)] = piece
                filled += len(piece)
        return out

    def pieces(self, blocks: np.ndarray, payload: int) -> np.ndarray:
        """Where the tokens of blocks lie: one piece for each shard that a block draws from.

        Args:
            blocks: int64 [B], block numbers below `block_count(payload)`.

        Returns:
            int64 [n, 4]: row (the block's place in `blocks`), shard, token offset in the shard, tokens. The pieces of a
            row stand together and in the order of their tokens; the rows are in order.
        """
        starts = np.asarray(blocks, np.int64) * payload
        stops = starts + payload
        first = np.searchsorted(self._ends, starts, side="right")
        counts = np.searchsorted(self._ends, stops, side="left") - first + 1
        rows = np.repeat(np.arange(len(starts)), counts)
        shards = first[rows] + np.arange(len(rows)) - (np.cumsum(counts) - counts)[rows]
        shard_starts = np.concatenate([np.zeros(1, np.int64), self._ends[:-1]])[shards]
        offsets = np.maximum(starts[rows], shard_starts) - shard_starts
        lengths = np.minimum(stops[rows], self._ends[shards]) - shard_starts - offsets
        pieces = np.stack([rows, shards, offsets, lengths], axis=1)
        return pieces[lengths > 0]  # an empty shard between two others has no piece

    def _tokens_of(self, shard: int) -> np.ndarray:
        mapped = self._maps.get(shard)
        if mapped is None:
            path = self.folder / f"{self.manifest.shards[shard].name}.tok"
            tokens = self.manifest.shards[shard].tokens
            mapped = np.memmap(path, self.dtype, "r", shape=(tokens,)) if tokens else np.zeros(0, self.dtype)
            self._maps[shard] = mapped
        return mapped
