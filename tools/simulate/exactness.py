"""Whether every sample comes once: each rank's share of each step, and each block within an epoch.

Nothing is taken from the theory of the order: samples are located and shared out as training does it, and what comes
out is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tools.simulate.distinct import distinct
from tools.simulate.plan import SimulatedPlan
from trainer.data.order.run_order import RunOrder
from trainer.data.order.sample_order import SampleOrder, rank_share
from trainer.schedule.batch_plan import StepRun

SAMPLES_AT_ONCE = 1 << 16  # located and compared together
OWN_CALLS_A_STEP = 4  # ranks that find their share themselves, in turn; at the first step all do
_PAGE_BITS = 1024


@dataclass
class Exactness:
    """What was counted.

    Attributes:
        samples: that the global batches of all steps hold.
        misplaced: of these, how many no rank has, or more than one.
        own_calls: shares that a rank was asked for alone, as in training.
        differing_shares: of these, how many were not the rank's part of the global batch.
        repeated_blocks: visits to a block that had been visited in the same epoch.
        chunks_a_batch: different chunks that a global batch draws from, on average over the steps.
    """

    samples: int = 0
    misplaced: int = 0
    own_calls: int = 0
    differing_shares: int = 0
    repeated_blocks: int = 0
    chunks_a_batch: float = 0.0

    @property
    def each_sample_once(self) -> bool:
        return not (self.misplaced or self.differing_shares or self.repeated_blocks)


def check_exactness(plan: SimulatedPlan, order: RunOrder, progress: Callable[[int], None]) -> Exactness:
    """Go through the steps of a plan.

    In each step every sample of the global batch is to be in the share of one rank. All ranks' shares are cut from
    the batch as `rank_share` sorts it; at the first step every rank, and at each further one a few in turn (so that
    each has its turn where there are steps enough), is asked for its own share as well, which must be the same.

    Args:
        progress: called with the steps done.
    """
    found = Exactness()
    done = chunks = 0
    seen: dict[int, SeenNumbers] = {}  # of each phase, whose blocks are others than those of the next
    for run in plan.batch.runs(plan.first_sample, plan.steps):
        size, phase = run.shape.global_size, run.shape.phase
        of_phase, begin = order.orders[phase], order.phases[phase].first_sample
        for start, steps in _pieces(run):
            samples = np.arange(start, start + steps * size)
            sources, blocks = order.locate(samples)
            numbers = _block_in_epoch(of_phase, samples - begin, sources, blocks)
            found.repeated_blocks += seen.setdefault(phase, SeenNumbers()).add(numbers)
            for step, part in enumerate(np.split(np.arange(len(samples)), steps), done):
                _check_shares(found, plan, step, samples[part], sources[part], blocks[part])
                chunks += _distinct_chunks(of_phase, sources[part], blocks[part])
            done += steps
            progress(done)
    found.chunks_a_batch = chunks / plan.steps
    return found


def _pieces(run: StepRun) -> Iterator[tuple[int, int]]:
    """Cut the run into (first sample, steps) of about SAMPLES_AT_ONCE samples each."""
    size = run.shape.global_size
    together = max(1, SAMPLES_AT_ONCE // size)
    for first in range(0, run.steps, together):
        yield run.first_sample + first * size, min(together, run.steps - first)


def _check_shares(
    found: Exactness,
    plan: SimulatedPlan,
    step: int,
    samples: NDArray[np.int64],
    sources: NDArray[np.int64],
    blocks: NDArray[np.int64],
) -> None:
    by_address = rank_share(samples, sources, blocks, 0, 1)
    times = np.bincount(by_address, minlength=len(samples))
    share = -(-len(samples) // plan.ranks)
    found.samples += len(samples)
    found.misplaced += int((times != 1).sum())
    asked = range(plan.ranks) if step == 0 else range(step * OWN_CALLS_A_STEP, (step + 1) * OWN_CALLS_A_STEP)
    for rank in sorted({turn % plan.ranks for turn in asked}):
        own = rank_share(samples, sources, blocks, rank, plan.ranks)
        found.own_calls += 1
        found.differing_shares += not np.array_equal(own, by_address[rank * share : (rank + 1) * share])


def _distinct_chunks(order: SampleOrder, sources: NDArray[np.int64], blocks: NDArray[np.int64]) -> int:
    chunks_of_source = -(-max(order.blocks) // order.chunk_blocks)
    return len(distinct(sources * chunks_of_source + blocks // order.chunk_blocks))


def _block_in_epoch(
    order: SampleOrder, samples: NDArray[np.int64], sources: NDArray[np.int64], blocks: NDArray[np.int64]
) -> NDArray[np.uint64]:
    """Give each (source, epoch, block) a number: uint64 [n], the same for two samples only if all three are."""
    _, visits = order.locate_visits(samples.astype(np.uint64))
    counts = np.array(order.blocks, np.uint64)
    bases = np.cumsum(counts) - counts
    epoch = visits // np.maximum(counts, 1)[sources]
    return epoch * counts.sum() + bases[sources] + blocks.astype(np.uint64)


class SeenNumbers:
    """A set of numbers that takes a bit for each, in pages of 1,024: small where the numbers lie close together."""

    def __init__(self) -> None:
        self._rows: dict[int, int] = {}
        self._bits = np.zeros((1024, _PAGE_BITS // 8), np.uint8)

    def add(self, numbers: NDArray[np.uint64]) -> int:
        """Add numbers; returns how many were there before, or are repeated among them."""
        different = distinct(numbers)
        pages, places = np.divmod(different, np.uint64(_PAGE_BITS))
        rows, columns = self._rows_of(pages), places >> np.uint64(3)
        bits = np.left_shift(np.uint8(1), (places & np.uint64(7)).astype(np.uint8))
        known = int(np.count_nonzero(self._bits[rows, columns] & bits))
        np.bitwise_or.at(self._bits, (rows, columns), bits)
        return len(numbers) - len(different) + known

    def _rows_of(self, pages: NDArray[np.uint64]) -> NDArray[np.intp]:
        """Find the row of each page; `pages` ascend. A page that is new gets the next row."""
        different = distinct(pages)
        rows = np.array([self._rows.setdefault(page, len(self._rows)) for page in different.tolist()], np.intp)
        if len(self._rows) > len(self._bits):
            grown = np.zeros((max(2 * len(self._bits), len(self._rows)), self._bits.shape[1]), np.uint8)
            grown[: len(self._bits)] = self._bits
            self._bits = grown
        return rows[np.searchsorted(different, pages)]
