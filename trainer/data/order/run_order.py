"""The order of a whole run: that of each phase after the other.

A phase cuts the sources into blocks of its own length, so it has an order of its own over its own blocks: sample t of
phase p is sample t − t_p of a `SampleOrder`, t_p the first sample of the phase. A run whose blocks keep their length is
one phase.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.order.permutation import KeyPurpose, fold_key
from trainer.data.order.sample_order import ORDER_VERSION, SampleOrder
from trainer.schedule.phases import Phases


def phase_seed(seed: int, phase: int) -> int:
    """Seed of the order of a phase: the first one has the run's, each other one a seed of its own."""
    return int(fold_key(KeyPurpose.PHASE, seed, phase)) >> 1 if phase else seed


class RunOrder:
    """The order of a run.

    Args:
        phases: of the run.
        orders: of each phase, over the same sources.
        seed: of the run.
    """

    def __init__(self, phases: Phases, orders: Sequence[SampleOrder], seed: int) -> None:
        assert len(phases) == len(orders)
        self.phases, self.orders, self.seed = phases, tuple(orders), seed
        self._starts = np.array([phase.first_sample for phase in phases], np.int64)

    @property
    def source_count(self) -> int:
        return len(self.orders[0].blocks)

    def locate(self, samples: np.ndarray) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Find where samples are, as `SampleOrder.locate`; the block is one of those of the sample's phase."""
        sources, blocks = np.empty(np.size(samples), np.int64), np.empty(np.size(samples), np.int64)
        for order, inside, of_phase in self._by_phase(samples):
            sources[inside], blocks[inside] = order.locate(of_phase)
        return sources, blocks

    def partners(self, samples: np.ndarray) -> NDArray[np.int64]:
        """Find another block for each sample, as `SampleOrder.partners`; one of those of the sample's phase."""
        blocks = np.empty(np.size(samples), np.int64)
        for order, inside, of_phase in self._by_phase(samples):
            blocks[inside] = order.partners(of_phase)
        return blocks

    def _by_phase(self, samples: np.ndarray) -> Iterator[tuple[SampleOrder, NDArray[np.intp], NDArray[np.int64]]]:
        """Yield for each phase that samples lie in its order, their places among them, and their numbers in it."""
        samples = np.asarray(samples)
        numbers = np.searchsorted(self._starts, samples, side="right") - 1
        for number in np.unique(numbers).tolist():
            inside = np.flatnonzero(numbers == number)
            yield self.orders[number], inside, samples[inside] - self._starts[number]

    def samples_in_phases(self, samples: int) -> list[int]:
        """Count how many of the first `samples` samples belong to each phase."""
        ends = [samples if phase.end_sample is None else min(phase.end_sample, samples) for phase in self.phases]
        return [max(0, end - phase.first_sample) for phase, end in zip(self.phases, ends, strict=True)]

    def epochs_in_phases(self, samples: int) -> list[list[float]]:
        """Count for each phase the passes over each source after `samples` samples of the run."""
        counts = self.samples_in_phases(samples)
        return [order.epochs(count) for order, count in zip(self.orders, counts, strict=True)]

    def epochs(self, samples: int) -> list[float]:
        """Count the passes over each source after `samples` samples, those of all phases together."""
        return [sum(passes) for passes in zip(*self.epochs_in_phases(samples), strict=True)]

    def source_tokens(self, samples: int) -> list[int]:
        """Count the positions of each source among the first `samples` samples."""
        counts = self.samples_in_phases(samples)
        visits = [order.visits(count) for order, count in zip(self.orders, counts, strict=True)]
        lengths = [phase.seq_len for phase in self.phases]
        return [sum(map(int.__mul__, of_source, lengths)) for of_source in zip(*visits, strict=True)]

    def describe(self) -> dict[str, Any]:
        """Describe all that decides the order as plain JSON; `spans` as [first sample of the phase, size, places].

        And `rope_theta` where phases change it.
        """
        first = self.orders[0]
        return {
            "version": ORDER_VERSION,
            "seed": self.seed,
            "chunk_blocks": first.chunk_blocks,
            "window_chunks": first.window_chunks,
            "phases": [
                {
                    "first_sample": phase.first_sample,
                    "seq_len": phase.seq_len,
                    "blocks": list(order.blocks),
                    "spans": order.describe()["spans"],
                    **({} if phase.rope_theta is None else {"rope_theta": phase.rope_theta.keys}),
                }
                for phase, order in zip(self.phases, self.orders, strict=True)
            ],
        }
