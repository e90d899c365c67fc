"""Which tokens of a block begin a document, and what attention within documents needs of that.

The `.doc` files of a data set are the only authority on borders: a separator among the tokens may be text.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trainer.data.dataset import ShardSet
from trainer.data.shard_parts import ShardParts
from trainer.errors import DamagedError


class DocumentBorders:
    """The document borders of one data set, looked up by block."""

    def __init__(self, shards: ShardSet) -> None:
        self.shards = shards
        self._borders = ShardParts(shards, "doc", "<u8")  # token offsets of documents, then the shard's length

    def starts(self, first: NDArray[np.int64], length: int) -> NDArray[np.bool_]:
        """Find which tokens of stretches of the stream begin a document, or what a stretch holds of one.

        Args:
            first: int64 [B], first token of each.

        Returns:
            [B, length]; the first token of a stretch is always True, and so is the first one from another shard.

        Raises:
            DamagedError: when a `.doc` file differs from its checksum, or its offsets, which ascend, lead out of the
                stretch.
        """
        _, shards, offsets, lengths = self.shards.pieces(first, length).T
        places = np.cumsum(lengths) - lengths  # of the pieces in the flattened result
        starts = np.zeros(len(first) * length, np.bool_)
        starts[places] = True
        for shard in np.unique(shards).tolist():
            here = np.flatnonzero(shards == shard)
            piece, distance = self._borders_within(shard, offsets[here], lengths[here])
            starts[places[here][piece] + distance] = True
        return starts.reshape(len(first), length)

    def _borders_within(
        self, shard: int, offsets: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Find for each border inside pieces of a shard the number of the piece and the tokens from its start."""
        borders = self._borders[shard]
        # Searched as uint64, which they are: beside int64 numpy would turn the whole file into floats.
        first = np.searchsorted(borders, (offsets + 1).astype(np.uint64))
        end = np.searchsorted(borders, (offsets + lengths).astype(np.uint64))
        counts = np.maximum(end - first, 0)
        piece = np.repeat(np.arange(len(offsets)), counts)
        index = first[piece] + np.arange(len(piece)) - (np.cumsum(counts) - counts)[piece]
        distance = borders[index].astype(np.int64) - offsets[piece]
        if (end < first).any() or (distance <= 0).any() or (distance >= lengths[piece]).any():
            raise unordered(self.shards, shard)
        return piece, distance


def unordered(shards: ShardSet, shard: int) -> DamagedError:
    """Make the error for document offsets of a shard that do not ascend."""
    name = f"{shards.manifest.shards[shard].name}.doc"
    return DamagedError(
        f"The document offsets in {name} do not ascend.",
        where=str(shards.folder / name),
        remedy="Copy the data set again, or prepare it again; `maskwright data verify` lists all damage.",
    )


def positions_in_documents(starts: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Compute the distance of each token from the start of its document: int64 [B, S].

    Args:
        starts: [B, S], True where a document begins; so is the first of every row.
    """
    places = np.arange(starts.shape[1])
    return places - np.maximum.accumulate(np.where(starts, places, 0), axis=1)


def length_counts(seq_len: int) -> int:
    """Count the shapes that `cumulative_lengths` may have for batches [B, S]: powers of four that hold B up to B·S."""
    return ((seq_len - 1).bit_length() + 1) // 2 + 1


def cumulative_lengths(starts: NDArray[np.bool_]) -> NDArray[np.int32]:
    """List where the documents of a batch begin in its flattened B·S tokens, then B·S, repeated: int32 [n + 1].

    It is what variable-length attention calls cu_seqlens; the documents that repeating the total adds are empty. n is
    the next power of four: the batches of a run come in one or two shapes, so a compiled model has few graphs.

    Args:
        starts: [B, S], True where a document begins; so is the first of every row.
    """
    first = np.flatnonzero(starts)
    bits = (len(first) - 1).bit_length()
    lengths = np.full((1 << bits + bits % 2) + 1, starts.size, np.int32)
    lengths[: len(first)] = first
    return lengths
