"""The loader: which blocks this rank reads next, read and masked by workers that hold no state.

The order says where sample t lies; the loader hands workers whole micro-batches of (t, source, block). A
worker keeps nothing between two of them, so any number of workers, and any restart, gives the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

from trainer.batch_plan import BatchPlan
from trainer.data.borders import DocumentBorders
from trainer.data.order import SampleOrder, rank_share
from trainer.data.shard_set import ShardSet
from trainer.signals import ignore_stop_signals

if TYPE_CHECKING:
    from trainer.objectives.mlm import Batch, MaskedLanguageModelling


class MicroBatches(Sampler[np.ndarray]):
    """This rank's micro-batches of `steps` steps from `first_sample` on, as int64 [micro_size, 3]: t, source, block."""

    def __init__(self, order: SampleOrder, plan: BatchPlan, rank: int, first_sample: int, steps: int) -> None:
        self.order, self.plan, self.rank = order, plan, rank
        self.first_sample, self.steps = first_sample, steps

    def __iter__(self) -> Iterator[np.ndarray]:
        plan = self.plan
        for step in range(self.steps):
            start = self.first_sample + step * plan.global_size
            samples = np.arange(start, start + plan.global_size, dtype=np.int64)
            sources, blocks = self.order.locate(samples)
            share = rank_share(samples, sources, blocks, self.rank, plan.world_size)
            places = np.stack([samples[share], sources[share], blocks[share]], axis=1)
            yield from places.reshape(plan.accumulation, plan.micro_size, 3)


class MaskedBlocks(Dataset[Any]):
    """Reads and masks the blocks of one micro-batch.

    Args:
        document_attention: whether batches tell where documents begin; if not, borders are not read.
    """

    def __init__(
        self, sources: list[ShardSet], objective: MaskedLanguageModelling, seed: int, document_attention: bool = False
    ) -> None:
        self.sources, self.objective, self.seed = sources, objective, seed
        self.borders = [DocumentBorders(source) for source in sources] if document_attention else None

    def __getitems__(self, places: np.ndarray) -> Batch:
        """Micro-batch of the (t, source, block) rows of `places` [B, 3]."""
        samples, sources, numbers = places.T
        payload = self.objective.payload
        blocks = np.empty((len(places), payload), np.int64)
        starts = None if self.borders is None else np.empty((len(places), payload), np.bool_)
        for source in np.unique(sources):
            rows = np.flatnonzero(sources == source)
            blocks[rows] = self.sources[source].read_blocks(numbers[rows], payload)
            if starts is not None and self.borders is not None:
                starts[rows] = self.borders[source].document_starts(numbers[rows], payload)
        return self.objective.make_batch(blocks, samples.astype(np.uint64), self.seed, starts)

    def __getitem__(self, place: np.ndarray) -> Batch:
        return self.__getitems__(place[None])


def training_batches(
    order: SampleOrder,
    plan: BatchPlan,
    dataset: MaskedBlocks,
    *,
    rank: int,
    first_sample: int,
    steps: int,
    workers: int,
    pin_memory: bool,
) -> DataLoader[Any]:
    """This rank's micro-batches of the next `steps` optimizer steps, in order."""
    return DataLoader(
        dataset,
        batch_sampler=MicroBatches(order, plan, rank, first_sample, steps),  # type: ignore[arg-type]  # rows, not a list of int
        num_workers=workers,
        collate_fn=_as_is,
        pin_memory=pin_memory,
        prefetch_factor=max(2, 2 * plan.accumulation // workers) if workers else None,
        worker_init_fn=_start_worker if workers else None,
    )


def _as_is(batch: Any) -> Any:
    return batch


def _start_worker(_worker: int) -> None:
    ignore_stop_signals()
