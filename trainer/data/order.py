"""Which block sample t is, in closed form.

The order of a run is a pure function of (seed, data, chunk, window, mixture): sample t can be located for any t
without having visited the samples before it. So the whole state of the data is one integer, the number of samples
consumed, and the same samples come in the same order for any number of ranks, workers or restarts and any batch.

Four steps lead from t to a block; PRP(n, key)(i) is `permutation.permute`:

1. mixture: (q, j) = divmod(t, M); PRP(M, key(seed, q))(j) is one of M places, of which source s holds n_s, by largest
   remainder of the weights. The r-th place of s is visit v = q·n_s + r to that source. One source: v = t.
2. epoch: (e, y) = divmod(v, N_s), N_s the blocks of s.
3. window: within each W·B positions of the epoch, PRP(window length, key(seed, s, e, window)) gives position z.
4. chunk: slot = z div B holds chunk PRP(full chunks, key(seed, s, e))(slot), and z mod B is the block in it. A short
   last chunk keeps the last slot.

So a data set smaller than a window is shuffled globally, a larger one by chunks and then within a window: reads stay
near each other on disk, and still a batch draws from many chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.permutation import KeyPurpose, UInt64s, fold_key, permute
from trainer.errors import UserError

ORDER_VERSION = 1  # of the order and of the masks; a change of either needs a new number and new golden hashes

# A weight is held to half a place in M: with 65,536, a share of 0.1 % is off by 0.8 % of itself at most. A power of 4
# is exactly the domain of a Feistel network, so no place is computed twice. A stretch of M blocks of 512 tokens is
# 34 M tokens, short beside any run that mixes sources.
MIXTURE_BLOCK = 1 << 16

_PIECE = 1 << 14  # indices worked on at once: 128 KiB an array, so that the intermediate arrays stay in the cache


class SampleOrder:
    """The order over one or several sources of blocks.

    Args:
        blocks: whole blocks in each source, N_s.
        weights: relative shares of the sources in the mixture. A source whose share rounds to no place in a mixture
            block is never visited; `places` tells.
        seed: in [0, 2^63).
        chunk_blocks: blocks a chunk, B.
        window_chunks: chunks a window, W.
        mixture_block: places a mixture block, M.

    Attributes:
        places: n_s, places of each source in a mixture block; they sum to M.

    Raises:
        UserError: when a source that has a weight has no block.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        weights: Sequence[float],
        seed: int,
        chunk_blocks: int,
        window_chunks: int,
        mixture_block: int = MIXTURE_BLOCK,
    ) -> None:
        assert len(blocks) == len(weights) > 0
        assert min(chunk_blocks, window_chunks, mixture_block) > 0
        for source, (count, weight) in enumerate(zip(blocks, weights, strict=True)):
            if weight > 0 and count == 0:
                one = len(blocks) == 1
                which = "data set" if one else f"data set number {source + 1}"
                raise UserError(
                    f"The {which} of data.train is smaller than one block.",
                    where="data.train" if one else f"data.train[{source}]",
                    remedy=f"Prepare more text{'' if one else ', give it weight 0,'} or lower data.seq_len.",
                )
        self.blocks, self.weights = tuple(blocks), tuple(weights)
        self.seed, self.chunk_blocks, self.window_chunks = seed, chunk_blocks, window_chunks
        self.mixture_block = mixture_block
        self.places = _largest_remainder(self.weights, mixture_block)

        counts = [max(count, 1) for count in blocks]  # a source without blocks has no places and is never located
        self._blocks = np.array(counts, np.uint64)
        self._windows = np.array([min(count, chunk_blocks * window_chunks) for count in counts], np.uint64)
        self._chunk = np.uint64(chunk_blocks)
        self._full_chunks = np.array([count // chunk_blocks for count in counts], np.uint64)
        self._places = np.array(self.places, np.uint64)
        self._place_ends = np.cumsum(self._places)
        self._only_source = self.places.index(mixture_block) if mixture_block in self.places else None

    def locate(self, samples: np.ndarray) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where samples are.

        Args:
            samples: int64 [n], sample numbers t in [0, 2^63), in any order.

        Returns:
            (source, block), each int64 [n]: which source, and which of its blocks.
        """
        samples = np.asarray(samples)
        assert samples.size == 0 or samples.min() >= 0, "sample numbers start at 0"
        sources, blocks = np.empty(samples.size, np.int64), np.empty(samples.size, np.int64)
        for start in range(0, samples.size, _PIECE):
            piece = slice(start, start + _PIECE)
            source, visit = self._visit(samples[piece].astype(np.uint64))
            sources[piece] = source
            blocks[piece] = self._block(source, visit)
        return sources, blocks

    def epochs(self, samples: int) -> list[float]:
        """Passes over each source after `samples` samples have been consumed; 0 for a source never visited.

        Costs at most one mixture block of work, however large `samples`.
        """
        if self._only_source is not None:
            visits = [samples if source == self._only_source else 0 for source in range(len(self.blocks))]
        else:
            whole, rest = divmod(samples, self.mixture_block)
            sources, _ = self._visit(np.arange(rest, dtype=np.uint64) + np.uint64(whole * self.mixture_block))
            begun = np.bincount(sources, minlength=len(self.blocks)).tolist()
            visits = [whole * places + extra for places, extra in zip(self.places, begun, strict=True)]
        return [visit / max(count, 1) for visit, count in zip(visits, self.blocks, strict=True)]

    def describe(self) -> dict[str, Any]:
        """All that decides the order, as plain JSON."""
        return {
            "version": ORDER_VERSION,
            "seed": self.seed,
            "blocks": list(self.blocks),
            "weights": list(self.weights),
            "chunk_blocks": self.chunk_blocks,
            "window_chunks": self.window_chunks,
            "mixture_block": self.mixture_block,
            "places": list(self.places),
        }

    def _visit(self, samples: UInt64s) -> tuple[NDArray[np.intp], UInt64s]:
        """Step 1: uint64 [n] sample numbers → source ([n], or [1] when there is one) and visit [n] to it."""
        if self._only_source is not None:
            return np.array([self._only_source]), samples
        block, offset = np.divmod(samples, np.uint64(self.mixture_block))
        place = permute(offset, self.mixture_block, fold_key(KeyPurpose.MIXTURE, self.seed, block))
        source = np.searchsorted(self._place_ends, place, side="right")
        places = self._places[source]
        rank = place - (self._place_ends[source] - places)
        return source, block * places + rank

    def _block(self, source: NDArray[np.intp], visit: UInt64s) -> UInt64s:
        """Steps 2 to 4: source ([n] or [1]) and visit uint64 [n] → block uint64 [n]."""
        blocks, window_size, full_chunks = self._blocks[source], self._windows[source], self._full_chunks[source]
        epoch, offset = np.divmod(visit, blocks)
        epoch_key = fold_key(KeyPurpose.EPOCH, self.seed, source, epoch)

        window, index = np.divmod(offset, window_size)
        window_start = window * window_size
        length = np.minimum(window_size, blocks - window_start)
        position = window_start + permute(index, length, fold_key(epoch_key, window))

        slot, within = np.divmod(position, self._chunk)
        in_full = np.flatnonzero(slot < full_chunks)
        if len(in_full) == len(slot):
            slot = permute(slot, full_chunks, epoch_key)
        elif len(in_full):
            each = np.broadcast_to(full_chunks, slot.shape)
            slot[in_full] = permute(slot[in_full], each[in_full], epoch_key[in_full])
        return slot * self._chunk + within


def rank_share(
    samples: np.ndarray, sources: np.ndarray, blocks: np.ndarray, rank: int, world_size: int
) -> NDArray[np.intp]:
    """Which samples of a global batch a rank takes: its slice of the batch sorted by address.

    Sorted by (source, block, sample number) and cut into equal slices, each rank, and each node, reads from its own
    part of the window.

    Args:
        samples: int64 [n], sample numbers of the global batch.
        sources, blocks: int64 [n], where `SampleOrder.locate` found them.

    Returns:
        [n / world_size] positions into the batch, in address order.
    """
    assert len(samples) % world_size == 0, "the global batch divides by the ranks"
    share = len(samples) // world_size
    by_address = np.lexsort((samples, blocks, sources))
    return by_address[rank * share : (rank + 1) * share]


def _largest_remainder(weights: Sequence[float], total: int) -> tuple[int, ...]:
    """Split `total` places by weight (Hamilton's method), exactly; of equal remainders the first source wins."""
    exact = [Fraction(weight) for weight in weights]
    whole = sum(exact)
    assert whole > 0 and min(exact) >= 0
    quotas = [weight * total / whole for weight in exact]
    places = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda source: places[source] - quotas[source])
    for source in by_remainder[: total - sum(places)]:
        places[source] += 1
    return tuple(places)
