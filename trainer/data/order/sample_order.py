"""Which block sample t of a phase is, in closed form; most runs are one phase (`trainer.data.order.run_order`).

The order of a run is a pure function of (seed, data, chunk, window, mixture): sample t can be located for any t
without having visited the samples before it. So the whole state of the data is one integer, the number of samples
consumed, and the same samples come in the same order for any number of ranks, workers or restarts and any batch.

Four steps lead from t to a block; PRP(n, key)(i) is `permutation.permute`:

1. mixture: (q, j) = divmod(t, M); PRP(M, key(seed, q))(j) is one of M places, of which source s holds n_s, by largest
   remainder of the weights. The r-th place of s is visit v = q·n_s + r to that source. One source: v = t. Where the
   weights change, at any sample, the last mixture block before is as short as it has to be, with places of its own,
   and the visits so far are added as a constant.
2. epoch: (e, y) = divmod(v, N_s), N_s the blocks of s.
3. window: within each W·B positions of the epoch, PRP(window length, key(seed, s, e, window)) gives position z.
4. chunk: slot = z div B holds chunk PRP(full chunks, key(seed, s, e))(slot), and z mod B is the block in it. A short
   last chunk keeps the last slot.

So a data set smaller than a window is shuffled globally, a larger one by chunks and then within a window: reads stay
near each other on disk, and still a batch draws from many chunks.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.order.permutation import KeyPurpose, UInt64s, another, fold_key, permute
from trainer.errors import UserError

ORDER_VERSION = 1  # of the order and of the masks; a change of either needs a new number and new golden hashes

# A weight is held to half a place in M: with 65,536, a share of 0.1 % is off by 0.8 % of itself at most. A power of 4
# is exactly the domain of a Feistel network, so no place is computed twice. A stretch of M blocks of 512 tokens is
# 34 M tokens, short beside any run that mixes sources.
MIXTURE_BLOCK = 1 << 16

_PIECE = 1 << 14  # indices worked on at once: 128 KiB an array, so that the intermediate arrays stay in the cache


@dataclass(frozen=True)
class Span:
    """A run of mixture blocks of one size with the same places.

    Attributes:
        start: first sample.
        size: places a mixture block.
        places: n_s, those of each source; they sum to `size`.
        first_block: number of its first mixture block, counted over all spans.
        bases: visits to each source before it.
    """

    start: int
    size: int
    places: tuple[int, ...]
    first_block: int
    bases: tuple[int, ...]

    @property
    def only_source(self) -> int | None:
        """The source that has all the places, if one has."""
        return self.places.index(self.size) if self.size in self.places else None


class SampleOrder:
    """The order over one or several sources of blocks.

    Args:
        blocks: whole blocks in each source, N_s.
        weights: relative shares of the sources in the mixture, from sample 0 on. A source whose share rounds to no
            place in a mixture block is not visited; `spans` tells.
        seed: in [0, 2^63).
        chunk_blocks: blocks a chunk, B.
        window_chunks: chunks a window, W.
        mixture_block: places a mixture block, M.
        changes: later weights, as (first sample, weights) with ascending samples above 0.

    Attributes:
        spans: the mixture over time; one span if the weights never change.

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
        changes: Sequence[tuple[int, Sequence[float]]] = (),
    ) -> None:
        assert len(blocks) == len(weights) > 0
        assert min(chunk_blocks, window_chunks, mixture_block) > 0
        stages = [(0, tuple(weights)), *((start, tuple(later)) for start, later in changes)]
        _refuse_empty_sources(blocks, stages)
        self.blocks, self.seed = tuple(blocks), seed
        self.chunk_blocks, self.window_chunks, self.mixture_block = chunk_blocks, window_chunks, mixture_block
        self.spans = tuple(_spans(stages, mixture_block))
        self._span_starts = np.array([span.start for span in self.spans], np.uint64)

        counts = [max(count, 1) for count in blocks]  # a source without blocks has no places and is never located
        self._blocks = np.array(counts, np.uint64)
        self._windows = np.array([min(count, chunk_blocks * window_chunks) for count in counts], np.uint64)
        self._chunk = np.uint64(chunk_blocks)
        self._full_chunks = np.array([count // chunk_blocks for count in counts], np.uint64)

    def locate(self, samples: np.ndarray) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Find where samples are.

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
            source, visit = self.locate_visits(samples[piece].astype(np.uint64))
            sources[piece] = source
            blocks[piece] = self._block(source, visit)
        return sources, blocks

    def partners(self, samples: np.ndarray) -> NDArray[np.int64]:
        """Find for each sample another block of its source, to be read beside its own.

        It is what another visit of the same window and epoch sees, each with the same chance: never the sample's own
        block, and as near to it on disk as those that are read anyway. Alone in its window a block is its own partner.

        Args:
            samples: as for `locate`.

        Returns:
            int64 [n], blocks.
        """
        samples = np.asarray(samples)
        blocks = np.empty(samples.size, np.int64)
        for start in range(0, samples.size, _PIECE):
            piece = slice(start, start + _PIECE)
            numbers = samples[piece].astype(np.uint64)
            source, visit = self.locate_visits(numbers)
            keys = fold_key(KeyPurpose.PARTNER, self.seed, numbers)
            _, index, length = self._within_window(source, visit % self._blocks[source])
            blocks[piece] = self._block(source, visit - index + another(index, length, keys))
        return blocks

    def visits(self, samples: int) -> list[int]:
        """Count each source's blocks among the first `samples` samples; costs at most one mixture block of work."""
        begun = bisect_right([span.start for span in self.spans], samples) - 1
        span = self.spans[begun]
        whole, rest = divmod(samples - span.start, span.size)
        sources, _ = self._visit_in(span, np.arange(samples - rest, samples, dtype=np.uint64))
        counted = rest * (np.arange(len(self.blocks)) == sources) if sources.size == 1 else np.bincount(sources)
        extra = [*counted.tolist(), *[0] * (len(self.blocks) - len(counted))]
        return [base + whole * places + more for base, places, more in zip(span.bases, span.places, extra, strict=True)]

    def epochs(self, samples: int) -> list[float]:
        """Count the passes over each source after `samples` samples; 0 for a source not visited."""
        return [visits / max(count, 1) for visits, count in zip(self.visits(samples), self.blocks, strict=True)]

    def describe(self) -> dict[str, Any]:
        """Describe all that decides the order as plain JSON; `spans` as [first sample, size, places of each source]."""
        return {
            "version": ORDER_VERSION,
            "seed": self.seed,
            "blocks": list(self.blocks),
            "chunk_blocks": self.chunk_blocks,
            "window_chunks": self.window_chunks,
            "spans": [[span.start, span.size, list(span.places)] for span in self.spans],
        }

    def locate_visits(self, samples: UInt64s) -> tuple[NDArray[np.intp], UInt64s]:
        """Do step 1: uint64 [n] sample numbers → source ([n], or [1] when there is one) and visit [n] to it."""
        if len(self.spans) == 1:
            return self._visit_in(self.spans[0], samples)
        numbers = np.searchsorted(self._span_starts, samples, side="right") - 1
        sources, visits = np.empty(samples.size, np.intp), np.empty(samples.size, np.uint64)
        for number in np.unique(numbers).tolist():
            inside = np.flatnonzero(numbers == number)
            sources[inside], visits[inside] = self._visit_in(self.spans[number], samples[inside])
        return sources, visits

    def _visit_in(self, span: Span, samples: UInt64s) -> tuple[NDArray[np.intp], UInt64s]:
        """Do what `locate_visits` does for samples of one span."""
        since = samples - np.uint64(span.start)
        only = span.only_source
        if only is not None:
            return np.array([only]), since + np.uint64(span.bases[only])
        block, offset = np.divmod(since, np.uint64(span.size))
        key = fold_key(KeyPurpose.MIXTURE, self.seed, block + np.uint64(span.first_block))
        place = permute(offset, span.size, key)
        all_places = np.array(span.places, np.uint64)
        ends = np.cumsum(all_places)
        source = np.searchsorted(ends, place, side="right")
        places = all_places[source]
        rank = place - (ends[source] - places)
        return source, np.array(span.bases, np.uint64)[source] + block * places + rank

    def _block(self, source: NDArray[np.intp], visit: UInt64s) -> UInt64s:
        """Do steps 2 to 4: source ([n] or [1]) and visit uint64 [n] → block uint64 [n]."""
        full_chunks = self._full_chunks[source]
        epoch, offset = np.divmod(visit, self._blocks[source])
        epoch_key = fold_key(KeyPurpose.EPOCH, self.seed, source, epoch)

        window, index, length = self._within_window(source, offset)
        position = offset - index + permute(index, length, fold_key(epoch_key, window))

        slot, within = np.divmod(position, self._chunk)
        in_full = np.flatnonzero(slot < full_chunks)
        if len(in_full) == len(slot):
            slot = permute(slot, full_chunks, epoch_key)
        elif len(in_full):
            each = np.broadcast_to(full_chunks, slot.shape)
            slot[in_full] = permute(slot[in_full], each[in_full], epoch_key[in_full])
        return slot * self._chunk + within

    def _within_window(self, source: NDArray[np.intp], offset: UInt64s) -> tuple[UInt64s, UInt64s, UInt64s]:
        """Find for places in an epoch, uint64 [n]: number of the window, index in it, and its length."""
        window_size = self._windows[source]
        window, index = np.divmod(offset, window_size)
        return window, index, np.minimum(window_size, self._blocks[source] - window * window_size)


def rank_share(
    samples: np.ndarray, sources: np.ndarray, blocks: np.ndarray, rank: int, world_size: int
) -> NDArray[np.intp]:
    """Find which samples of a global batch a rank takes: its slice of the batch sorted by address.

    Sorted by (source, block, sample number) and cut into equal slices, each rank, and each node, reads from its own
    part of the window. Where the batch does not divide, as the last one of a run may not, the last slices are shorter.

    Args:
        samples: int64 [n], sample numbers of the global batch.
        sources, blocks: int64 [n], where `SampleOrder.locate` found them.

    Returns:
        [⌈n / world_size⌉] positions into the batch, or fewer, in address order.
    """
    share = -(-len(samples) // world_size)
    by_address = np.lexsort((samples, blocks, sources))
    return by_address[rank * share : (rank + 1) * share]


def _refuse_empty_sources(blocks: Sequence[int], stages: Sequence[tuple[int, Sequence[float]]]) -> None:
    for source, count in enumerate(blocks):
        if count == 0 and any(weights[source] > 0 for _, weights in stages):
            one = len(blocks) == 1
            which = "data set" if one else f"data set number {source + 1}"
            raise UserError(
                f"The {which} of data.train is smaller than one block.",
                where="data.train" if one else f"data.train[{source}]",
                remedy=f"Prepare more text{'' if one else ', leave it out'} or lower data.seq_len.",
            )


def _spans(stages: Sequence[tuple[int, tuple[float, ...]]], mixture_block: int) -> Iterator[Span]:
    """Cut (first sample, weights) stages into spans: whole mixture blocks, then a short one up to the next stage."""
    first_block, bases = 0, tuple(0 for _ in stages[0][1])
    ends = [start for start, _ in stages[1:]]
    for (start, weights), end in zip(stages, [*ends, None], strict=True):
        assert end is None or end > start, "stages ascend"
        whole, rest = divmod(end - start, mixture_block) if end is not None else (1, 0)
        for size, count, at in ((mixture_block, whole, start), (rest, 1, start + whole * mixture_block)):
            if size and count:
                places = _largest_remainder(weights, size)
                yield Span(at, size, places, first_block, bases)
                first_block += count
                bases = tuple(base + count * number for base, number in zip(bases, places, strict=True))


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
