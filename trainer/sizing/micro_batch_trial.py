"""The largest micro-batch that a GPU has memory for, found with real steps of a real engine."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence

import torch

from trainer.config import Config
from trainer.data.tokenizer import Vocabulary
from trainer.engine.deepspeed_config import compose, load_preset
from trainer.engine.engine import TrainingEngine
from trainer.engine.loss_kernel import resolve_loss_kernel
from trainer.model.attention_backend import preferring
from trainer.model.compiling import forget_graphs
from trainer.model.teacher import load_teacher
from trainer.model.trained import build_trained
from trainer.objectives.objective import Criterion, loss_sums
from trainer.objectives.registry import family_of, make_criterion, make_samples
from trainer.runtime import distributed
from trainer.runtime.distributed import World
from trainer.schedule.batch_plan import BatchPlan
from trainer.sizing.made_up import made_up_batch
from trainer.sizing.memory_estimate import MemoryEstimate
from trainer.sizing.zero_memory import GPU_SHARE

logger = logging.getLogger(__name__)
_ACCUMULATION = 3  # micro-batches of a trial step: one that makes gradients, one that adds to them, one that reduces


def largest_by_trial(
    config: Config, vocabulary: Vocabulary, world: World, seq_len: int, sizes: Sequence[int]
) -> int | None:
    """Try ascending micro-batches until one does not fit on some rank, from half of what is foreseen; a collective.

    Each size costs a step and, in a compiled model, a compilation. After one that does not fit the engine is of no more
    use; should already the first be too large, the smaller ones get another.

    The allocator of every rank gets the same limit, the least that any of them could have: so the same allocations fail
    on all ranks at the same place, none waits in a collective for one that has failed, and the limit leaves a margin.
    Where a micro-batch needs no collective of DeepSpeed's (stages 0 and 1, but for the last one of a step) the ranks
    vote first, so that even one that fails alone is waited for by nobody.

    Returns:
        the largest that fits on all ranks; None when the first does not.
    """
    limit = limit_memory(config, world)
    first = distributed.run_on_all_ranks(
        world, lambda: _first_to_try(config, vocabulary, world.size, seq_len, sizes, limit)
    )
    wanted = config.model.attention_backend  # auto is settled later, among such that take the same memory
    usual = "flash" if config.train.deterministic else None
    try:
        with preferring(usual if wanted == "auto" else wanted, world.device):
            teacher = distributed.run_on_all_ranks(
                world, lambda: load_teacher(config, vocabulary, family_of(config), world.device)
            )
            criterion = make_criterion(config, resolve_loss_kernel(config, vocabulary.size, world), teacher)
            largest = _try_in_turn(config, vocabulary, world, seq_len, sizes[first:], criterion)
            if largest is None and first:
                largest = _try_in_turn(config, vocabulary, world, seq_len, sizes[:first], criterion)
    finally:
        if world.device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, world.device)
            torch.cuda.reset_peak_memory_stats(world.device)  # the run's own peak is what its metrics report
    return largest


def _first_to_try(
    config: Config, vocabulary: Vocabulary, ranks: int, seq_len: int, sizes: Sequence[int], limit: float | None
) -> int:
    """Find the place in `sizes` of the largest up to half of what the memory model foresees; 0 without a limit.

    Args:
        limit: bytes of a rank.
    """
    if limit is None:
        return 0
    estimate = MemoryEstimate(config, vocabulary, load_preset(config.deepspeed), "cuda", seq_len)
    foreseen = estimate.largest(sizes, ranks, limit) or 0
    first = max(0, sum(2 * size <= foreseen for size in sizes) - 1)
    logger.info("a micro-batch of %d is foreseen to fit; the trial begins with %d", foreseen, sizes[first])
    return first


def _try_in_turn(
    config: Config, vocabulary: Vocabulary, world: World, seq_len: int, sizes: Sequence[int], criterion: Criterion
) -> int | None:
    """Try `sizes` in turn with an engine of their own, of which nothing is left; returns the last that fits or None."""
    trial = None
    try:
        trial = _Trial.start(config, vocabulary, world, seq_len, len(sizes), criterion)
        if trial is None:
            return None
        return _last_that_fits(trial, sizes)
    finally:
        if trial is not None:
            trial.engine.close()
        del trial
        if config.model.compile:
            forget_graphs()
        _release(world.device)


def _last_that_fits(trial: _Trial, sizes: Sequence[int]) -> int | None:
    largest = None
    for size in sizes:
        if not trial.fits(size):
            break
        largest = size
    return largest


def limit_memory(config: Config, world: World) -> float | None:
    """Give the allocators of all ranks the same limit, in bytes; on CPU there is none to give."""
    if world.device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(world.device)
    wanted = config.batch.memory_gib
    own = GPU_SHARE * free if wanted is None else wanted * 2**30
    least = min(distributed.all_gather(world, min(own, free)))
    torch.cuda.set_per_process_memory_fraction(min(1.0, least / total), world.device)
    return least


class _Trial:
    """An engine that is thrown away, and batches of made-up tokens."""

    def __init__(
        self, config: Config, vocabulary: Vocabulary, world: World, seq_len: int, shapes: int, criterion: Criterion
    ) -> None:
        plan = BatchPlan(_ACCUMULATION * world.size, 1, world.size, _ACCUMULATION, seq_len, total_steps=1)
        built = build_trained(config, vocabulary, family_of(config))
        self.world = world
        self.engine = TrainingEngine(
            built, compose(config, load_preset(config.deepspeed), plan), config.optimizer, world
        )
        if config.model.compile:
            # CUDA graphs go with a given micro-batch only, and a trial is no place to time kernels.
            self.engine.compile(True, shapes=shapes)
        self.criterion = criterion
        self._samples, self._token = make_samples(config, vocabulary, seq_len), vocabulary.end_id

    @classmethod
    def start(
        cls, config: Config, vocabulary: Vocabulary, world: World, seq_len: int, shapes: int, criterion: Criterion
    ) -> _Trial | None:
        """Start a trial; None on every rank when not even the engine fits on one of them."""
        trial = None
        try:
            trial = cls(config, vocabulary, world, seq_len, shapes, criterion)
        except torch.OutOfMemoryError as error:
            logger.info("the engine alone does not fit: %s", error)
        return trial if _all_agree(world, trial is not None) else None

    def fits(self, micro_size: int) -> bool:
        """Try a step of such micro-batches, and tell whether every rank has done it; every rank calls it."""
        # The reduction of the last micro-batch follows the vote: with stages 0 and 1, only there ranks wait for others.
        self.engine.begin_step(micro_size, _ACCUMULATION)
        for micro_batches in (_ACCUMULATION - 1, 1):
            done = True
            try:
                for _ in range(micro_batches):
                    self._micro_step(micro_size)
                if self.world.device.type == "cuda":
                    torch.cuda.synchronize(self.world.device)
            except torch.OutOfMemoryError as error:
                logger.info("a micro-batch of %d does not fit: %s", micro_size, error)
                done = False
            _release(self.world.device)
            if not _all_agree(self.world, done):
                return False
        return True

    def _micro_step(self, micro_size: int) -> None:
        batch = made_up_batch(self._samples, micro_size, self._token).to(self.engine.device)
        losses = loss_sums(self.criterion, self.engine.network, batch, source_count=1)
        # Gradients of nought take as much memory. Those of equal tokens all point one way: in fp16 they would overflow,
        # and a step that is skipped never makes AdamW's state.
        self.engine.backward(losses.sum() * 0)
        self.engine.step(learning_rate=0.0)


def _all_agree(world: World, yes: bool) -> bool:
    return distributed.all_reduce_sum(world, [yes])[0] == world.size


def _release(device: torch.device) -> None:
    """Empty torch's cache, so that what one trial has cut into pieces is no hindrance to the next."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
