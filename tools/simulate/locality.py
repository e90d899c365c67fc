"""How local a rank's reads are: pages of the page cache that it has read, over the bytes that it uses.

The kernel reads a token file by pages of 4 KiB, of which a block of 510 tokens fills a quarter. Each reader (a rank
with a page cache of its own) reads a page once in a window if it needs any part of it; readahead is off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tools.simulate.distinct import distinct
from tools.simulate.plan import SimulatedPlan, SimulatedSource
from trainer.data.order.run_order import RunOrder
from trainer.data.order.sample_order import rank_share

PAGE_BYTES = 4096
MOST_READERS = 4096
MOST_SAMPLES = 1 << 20  # of a window that is larger, a part is simulated


@dataclass(frozen=True)
class Locality:
    """Of one number of readers.

    Attributes:
        blocks_a_step: blocks a reader takes a step.
        mean, worst: bytes of the pages a reader reads, over bytes it uses; over all readers.
    """

    readers: int
    blocks_a_step: int
    mean: float
    worst: float


def measure_locality(plan: SimulatedPlan, order: RunOrder) -> tuple[list[Locality], int]:
    """Measure pages over bytes used for 1, 2, 4, … readers, as far as they divide the global batch.

    Of a run whose steps differ those where the simulation starts count, as if there were no others.

    Returns:
        the table, and the number of samples that it is over.
    """
    samples = _samples_of_a_window(plan, order)
    first, last = pages_of_samples(plan, order, samples)
    size, phase = samples.shape[1], plan.phases.number_at(plan.first_sample)
    block_bytes = plan.payload(phase) * plan.sources[0].token_bytes  # one tokenizer, so one size of token
    found = []
    readers = 1
    while readers <= MOST_READERS:
        if size % readers == 0:
            pages = _pages_a_reader(first, last, readers)
            ratios = pages * PAGE_BYTES / (first.size // readers * block_bytes)
            found.append(Locality(readers, size // readers, float(ratios.mean()), float(ratios.max())))
        readers *= 2
    return found, first.size


def _samples_of_a_window(plan: SimulatedPlan, order: RunOrder) -> NDArray[np.int64]:
    """Choose whole steps within the window where the simulation starts, and within its phase.

    Returns int64 [steps, global batch].

    With several sources the windows do not end together; a stretch as long as the largest is taken.
    """
    number = plan.phases.number_at(plan.first_sample)
    of_phase, phase = order.orders[number], order.phases[number]
    size = plan.batch.shape_at(plan.first_sample).global_size
    window = min(max(of_phase.blocks), of_phase.chunk_blocks * of_phase.window_chunks)
    start = plan.first_sample - phase.first_sample
    if len(plan.sources) == 1:
        in_epoch = start % of_phase.blocks[0]
        start -= in_epoch % window
    most = (
        MOST_SAMPLES if phase.end_sample is None else min(MOST_SAMPLES, phase.end_sample - phase.first_sample - start)
    )
    steps = max(1, min(window, most) // size)
    return phase.first_sample + start + np.arange(steps * size).reshape(steps, size)


def pages_of_samples(
    plan: SimulatedPlan, order: RunOrder, samples: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Find the first and last page of the blocks of samples.

    Args:
        samples: int64 [steps, global batch].

    Returns:
        int64 [steps, global batch] each, pages counted through all shards of all sources; within a step in the order
        of `rank_share`, so that equal slices are the shares of ranks.
    """
    first, last = np.empty_like(samples), np.empty_like(samples)
    tables, payload = _PageTables(plan.sources), plan.payload(plan.phases.number_at(int(samples[0, 0])))
    for step, batch in enumerate(samples):
        sources, blocks = order.locate(batch)
        by_address = rank_share(batch, sources, blocks, 0, 1)
        start = blocks[by_address] * payload
        first[step] = tables.pages(sources[by_address], start)
        last[step] = tables.pages(sources[by_address], start + payload - 1)
    return first, last


def _pages_a_reader(first: NDArray[np.int64], last: NDArray[np.int64], readers: int) -> NDArray[np.int64]:
    """Count the different pages that each reader touches: int64 [readers]."""
    steps, size = first.shape
    reader = np.broadcast_to(np.repeat(np.arange(readers), size // readers), (steps, size))
    pages_in_all = int(last.max()) + 1 - int(first.min())
    touched = []
    for further in range(int((last - first).max()) + 1):
        there = first + further <= last
        touched.append(reader[there] * pages_in_all + (first[there] + further - first.min()))
    return np.bincount(distinct(np.concatenate(touched)) // pages_in_all, minlength=readers)


class _PageTables:
    """Tokens of sources → pages, numbered through the shards, each of which starts at a page of its own."""

    def __init__(self, sources: Sequence[SimulatedSource]) -> None:
        self._ends, self._first_pages, self._sources = [], [], sources
        pages_before = 0
        for source in sources:
            pages = -(-source.shard_tokens * source.token_bytes // PAGE_BYTES)
            self._ends.append(np.cumsum(source.shard_tokens))
            self._first_pages.append(pages_before + np.cumsum(pages) - pages)
            pages_before += int(pages.sum())

    def pages(self, sources: NDArray[np.int64], tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """Find the page of each token (int64 [n], its place in its source): int64 [n]."""
        pages = np.empty_like(tokens)
        for number in np.unique(sources).tolist():
            rows = np.flatnonzero(sources == number)
            ends = self._ends[number]
            shard = np.searchsorted(ends, tokens[rows], side="right")
            start = ends[shard] - self._sources[number].shard_tokens[shard]
            offset = (tokens[rows] - start) * self._sources[number].token_bytes
            pages[rows] = self._first_pages[number][shard] + offset // PAGE_BYTES
        return pages
