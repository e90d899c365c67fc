"""The loader: which blocks this rank reads next, read and masked by workers that hold no state.

The order says where sample t lies; the loader hands workers whole micro-batches of (t, source, block). A
worker keeps nothing between two of them, so any number of workers, and any restart, gives the same batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from trainer.data.batch import Batch, Samples
from trainer.data.block_reader import BlockReader
from trainer.data.blocks import Blocks
from trainer.data.dataset import ShardSet
from trainer.data.order.run_order import RunOrder
from trainer.data.order.sample_order import SampleOrder, rank_share
from trainer.errors import MaskwrightError
from trainer.runtime.rendezvous import close_listening_sockets
from trainer.runtime.signals import ignore_stop_signals
from trainer.schedule.batch_plan import BatchPlan

PADDING = -1  # in the place of a sample number: a row without predictions
_LOCATED_AT_ONCE = 4096  # samples: locating 64 costs about as much


@dataclass(frozen=True)
class MicroBatches(Sampler[np.ndarray]):
    """This rank's micro-batches of `steps` steps from `first_sample` on, as int64 [micro_size, 3]: t, source, block.

    Where the samples ask for a partner of each block, it is a fourth number.

    A step with fewer samples than its micro-batches have room for is filled up with rows whose t is PADDING. All of
    them are of one phase. The blocks of the step after the one handed out are announced to the kernel, which has them
    read meanwhile.
    """

    order: RunOrder | SampleOrder
    plan: BatchPlan
    readers: Sequence[BlockReader]
    rank: int
    first_sample: int
    steps: int

    def __iter__(self) -> Iterator[np.ndarray]:
        shares = self._shares()
        share = next(shares, None)
        while share is not None:
            following = next(shares, None)
            if following is not None:
                self._advise(following.reshape(-1, following.shape[-1]))
            yield from share
            share = following

    def _shares(self) -> Iterator[NDArray[np.int64]]:
        """Yield this rank's share of each step: int64 [accumulation, micro_size, 3 or 4]."""
        with_partners = self.readers[0].view.partner
        for run in self.plan.runs(self.first_sample, self.steps):
            shape, size = run.shape, run.shape.global_size
            located_steps = max(1, _LOCATED_AT_ONCE // size)
            for first_step in range(0, run.steps, located_steps):
                steps = min(located_steps, run.steps - first_step)
                start = run.first_sample + first_step * size
                samples = np.arange(start, start + steps * size, dtype=np.int64)
                partners = [self.order.partners(samples)] if with_partners else []
                places = np.stack([samples, *self.order.locate(samples), *partners], axis=1)
                for step in places.reshape(steps, size, -1):
                    numbers, sources, blocks, *_ = step.T
                    share = step[rank_share(numbers, sources, blocks, self.rank, shape.world_size)]
                    share = share if len(share) == shape.rank_size else _filled_up(share, step, shape.rank_size)
                    yield share.reshape(shape.accumulation, shape.micro_size, -1)

    def _advise(self, share: NDArray[np.int64]) -> None:
        for source, rows in _by_source(share[:, 1], share):
            _, _, blocks, *partners = rows.T
            self.readers[source].advise(blocks, *partners)


def _filled_up(share: NDArray[np.int64], step: NDArray[np.int64], rows: int) -> NDArray[np.int64]:
    """Fill the share [n, 3 or 4] up to `rows` of it with padding: its last block again, so that addresses ascend."""
    padding = np.repeat(share[-1:] if len(share) else step[:1], rows - len(share), axis=0)
    padding[:, 0] = PADDING
    return np.concatenate([share, padding])


@dataclass(frozen=True)
class ReadFailure:
    """What a worker hands over instead of a batch: the exception itself, which PyTorch would turn into another."""

    error: MaskwrightError


class SampledBlocks(Dataset[Any]):
    """Reads the blocks of one micro-batch, and has an objective make a batch of them."""

    def __init__(self, sources: list[ShardSet], samples: Samples, seed: int) -> None:
        self.samples, self.seed = samples, seed
        self.readers = [BlockReader(source, samples) for source in sources]

    def __getitems__(self, places: np.ndarray) -> Batch | ReadFailure:
        """Make the micro-batch of the rows of `places`, [B, 3] or, with partners, [B, 4]; see `MicroBatches`."""
        numbers, sources, *blocks = places.T
        padding = numbers == PADDING
        try:
            read = self._read(sources, *blocks)
        except MaskwrightError as error:
            return ReadFailure(error)
        if padding.any():  # they take after a sample that is there, so that the shape does
            numbers = np.where(padding, numbers[~padding][0] if not padding.all() else 0, numbers)
        batch = self.samples.make_batch(read, numbers.astype(np.uint64), self.seed)
        if padding.any():
            batch.leave_out(padding)
        if len(self.readers) > 1:
            batch.sources = torch.from_numpy(sources.copy())
        return batch

    def __getitem__(self, place: np.ndarray) -> Batch | ReadFailure:
        return self.__getitems__(place[None])

    def _read(self, sources: NDArray[np.int64], *numbers: NDArray[np.int64]) -> Blocks:
        """Read blocks, and their partners, of several sources, which share a tokenizer and so a dtype."""
        parts = [
            (rows, self.readers[source].read(*(each[rows] for each in numbers)))
            for source, rows in _by_source(sources, np.arange(len(sources)))
        ]
        if len(parts) == 1:
            return parts[0][1]
        places = np.argsort(np.concatenate([rows for rows, _ in parts]))
        return _joined([blocks for _, blocks in parts], places)


class TrainingBatches:
    """This rank's micro-batches of the next `steps` optimizer steps, which are of one phase, in order.

    Raises:
        MaskwrightError: while iterating, what a worker met when it read, in the place of the batch.
    """

    def __init__(
        self,
        order: RunOrder | SampleOrder,
        plan: BatchPlan,
        dataset: SampledBlocks,
        *,
        rank: int,
        first_sample: int,
        steps: int,
        workers: int,
        pin_memory: bool,
    ) -> None:
        accumulation = max((run.shape.accumulation for run in plan.runs(first_sample, steps)), default=1)
        self.loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=MicroBatches(order, plan, dataset.readers, rank, first_sample, steps),  # type: ignore[arg-type]  # rows, not a list of int
            num_workers=workers,
            collate_fn=_as_is,
            pin_memory=pin_memory,
            prefetch_factor=max(2, 2 * accumulation // workers) if workers else None,
            worker_init_fn=_start_worker if workers else None,
        )

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self.loader)
        try:
            for batch in batches:
                if isinstance(batch, ReadFailure):
                    raise batch.error
                yield batch
        finally:
            # The traceback of an error keeps the iterator alive, and Python, as it exits, sends TERM to the workers
            # and waits for them: they ignore it, so the rank would never end.
            end_workers = getattr(batches, "_shutdown_workers", None)
            if end_workers is not None:
                end_workers()


def _joined(parts: Sequence[Blocks], places: NDArray[np.intp]) -> Blocks:
    """Put blocks of several sources into one; row i is row `places[i]` of all of them, one after the other."""

    def join(values: Iterable[np.ndarray]) -> np.ndarray:
        return np.concatenate(list(values))[places]

    lengths = [blocks.lengths for blocks in parts if blocks.lengths is not None]
    cuts = [blocks.cuts for blocks in parts if blocks.cuts is not None]
    partners = [blocks.partner for blocks in parts if blocks.partner is not None]
    return Blocks(
        join(blocks.tokens for blocks in parts),
        {mark: join(blocks.starts[mark] for blocks in parts) for mark in parts[0].starts},
        join(lengths) if lengths else None,
        join(cuts) if cuts else None,
        _joined(partners, places) if partners else None,
    )


def _by_source(sources: NDArray[np.int64], values: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield each source that is there, with its values."""
    for source in np.unique(sources).tolist():
        yield source, values[sources == source]


def _as_is(batch: Any) -> Any:
    return batch


def _start_worker(_worker: int) -> None:
    ignore_stop_signals()
    close_listening_sockets()
