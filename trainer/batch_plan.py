"""Batch arithmetic: who processes how many sequences, and how long the run is."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainer.config import BatchConfig, TrainConfig
from trainer.errors import UserError


@dataclass(frozen=True)
class BatchPlan:
    """Sizes in sequences: global_size = micro_size × world_size × accumulation."""

    global_size: int
    micro_size: int
    world_size: int
    accumulation: int
    seq_len: int
    total_steps: int
    micro_size_is_open: bool = False
    """With batch.micro_size: auto, before it is found: micro_size is then 1, which stands for any."""

    @property
    def tokens_per_step(self) -> int:
        return self.global_size * self.seq_len

    @property
    def rank_size(self) -> int:
        """Sequences a rank in one optimizer step."""
        return self.micro_size * self.accumulation

    def describe(self) -> str:
        divided = f"{self.micro_size} micro × {self.world_size} ranks × {self.accumulation} accumulation"
        if self.micro_size_is_open:
            divided = f"micro × {self.world_size} ranks × accumulation, of {self.rank_size} sequences a rank"
        return (
            f"{self.global_size} sequences a step = {divided}; "
            f"{self.tokens_per_step:,} tokens a step, {self.total_steps:,} steps"
        )


def micro_sizes(global_size: int, world_size: int) -> list[int]:
    """Every micro-batch that a global batch divides into over the ranks, ascending; empty when there is none."""
    return [size for size in range(1, global_size // world_size + 1) if global_size % (size * world_size) == 0]


def plan_batch(
    batch: BatchConfig,
    train: TrainConfig,
    seq_len: int,
    world_size: int,
    epoch_blocks: int,
    micro_size: int | None = None,
) -> BatchPlan:
    """Derive accumulation and the number of steps.

    Args:
        epoch_blocks: blocks in one pass over the training data, for `train.epochs`.
        micro_size: what `batch.micro_size: auto` stands for; None where it is not found yet.

    Raises:
        UserError: when the global batch does not divide into micro-batches over the ranks.
    """
    is_open = batch.micro_size == "auto" and micro_size is None
    size = (micro_size or 1) if batch.micro_size == "auto" else batch.micro_size
    per_pass = size * world_size
    if batch.global_size % per_pass:
        fitting = micro_sizes(batch.global_size, world_size)
        below, above = batch.global_size // per_pass * per_pass, -(-batch.global_size // per_pass) * per_pass
        sizes = " or ".join(str(multiple) for multiple in (below, above) if multiple)
        micro = f", or batch.micro_size to one of {fitting}" if fitting else ""
        raise UserError(
            f"batch.global_size {batch.global_size} does not divide into micro-batches of {size} "
            f"on {world_size} rank{'s' if world_size > 1 else ''} "
            f"({size} × {world_size} = {per_pass} sequences a pass).",
            where=f"batch.global_size={batch.global_size}, batch.micro_size={batch.micro_size}, ranks={world_size}",
            remedy=f"Set batch.global_size to {sizes}{micro}.",
        )
    if train.steps is not None:
        total_steps = train.steps
    elif train.tokens is not None:
        total_steps = math.ceil(train.tokens / (batch.global_size * seq_len))
    else:
        assert train.epochs is not None
        total_steps = max(1, math.ceil(train.epochs * epoch_blocks / batch.global_size))
    return BatchPlan(
        global_size=batch.global_size,
        micro_size=size,
        world_size=world_size,
        accumulation=batch.global_size // per_pass,
        seq_len=seq_len,
        total_steps=total_steps,
        micro_size_is_open=is_open,
    )
