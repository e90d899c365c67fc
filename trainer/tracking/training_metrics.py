"""The training line of metrics.jsonl: reduced over the ranks and read from the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trainer.config import Config
from trainer.data.batch import Batch
from trainer.data.order.run_order import RunOrder
from trainer.objectives.objective import Criterion
from trainer.runtime import distributed
from trainer.runtime.distributed import World
from trainer.schedule.batch_plan import BatchPlan, StepShape
from trainer.schedule.learning_rate import learning_rate
from trainer.state import TrainState
from trainer.tracking.metrics import ThroughputMeter, counters, peak_memory_gib


@dataclass(frozen=True)
class StepMetrics:
    """Fills the metrics of training lines, as trainer.tracking.metrics has them; every rank calls it."""

    config: Config
    plan: BatchPlan
    world: World
    criterion: Criterion
    order: RunOrder
    meter: ThroughputMeter

    def read(
        self,
        state: TrainState,
        loss_sums: torch.Tensor,
        counts: Sequence[float],
        micro_batches: list[Batch],
        shape: StepShape,
        grad_norm: float,
        loss_scale: float,
    ) -> dict[str, Any]:
        """Reduce and read; the only place where the host waits for the device.

        Args:
            state: after the step.
            loss_sums: [terms, sources], of this rank's losses in the step, nats.
            counts: of the labels of each term in the global batch.
            micro_batches: of this rank in the step.
            shape: of the step.
            grad_norm, loss_scale: of the engine, after the step.
        """
        totals = np.reshape(
            distributed.all_reduce_sum(self.world, loss_sums.flatten().tolist()), tuple(loss_sums.shape)
        )
        terms = self.criterion.terms
        means = [
            float(sum(of_term)) / count if count else math.nan for of_term, count in zip(totals, counts, strict=True)
        ]
        loss = sum(term.weight * mean for term, mean, count in zip(terms, means, counts, strict=True) if count)
        factor, peak = self.order.phases[shape.phase].lr_factor, self.config.optimizer.lr
        rate = learning_rate(state.step, peak, self.plan.total_steps, self.config.schedule, factor)
        peaks = distributed.all_gather_floats(self.world, peak_memory_gib(self.world.device))
        peak, reserved = map(max, zip(*peaks, strict=True))
        return {
            **counters(state),
            "train/loss": loss,
            "train/learning_rate": rate,
            "train/grad_norm": grad_norm,
            "train/skipped_steps": state.skipped_steps,
            "train/loss_scale": loss_scale,
            "resilience/rollbacks": len(state.rollbacks),
            "resilience/skipped_samples": state.skipped_samples,
            "train/epoch": max(self.order.epochs(state.samples)),
            **self.meter.read(),
            "memory/peak_gib": peak,
            "memory/reserved_gib": reserved,
            **(self._batch_values(shape) if self.plan.sizes_vary else {}),
            **(self._term_values(means, counts, shape) if len(terms) > 1 else {}),
            **(self._source_values(state, totals, micro_batches) if totals.shape[1] > 1 else {}),
        }

    def _batch_values(self, shape: StepShape) -> dict[str, Any]:
        return {"batch/global_size": shape.global_size, "batch/seq_len": shape.seq_len}

    def _term_values(self, means: Sequence[float], counts: Sequence[float], shape: StepShape) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for term, mean, count in zip(self.criterion.terms, means, counts, strict=True):
            values[f"train/loss/{term.name}"] = mean
            if term.one_a_block:
                values[f"train/ignored/{term.name}"] = 1.0 - count / shape.global_size
        return values

    def _source_values(self, state: TrainState, totals: np.ndarray, micro_batches: list[Batch]) -> dict[str, Any]:
        """Compute loss of the step, epochs and tokens of each source; `totals` [terms, sources] are over all ranks."""
        losses = labels = np.zeros(totals.shape[1])
        for sums, term in zip(totals, self.criterion.terms, strict=True):
            of_rank = sum(batch.count_by_source(term.name, len(losses)) for batch in micro_batches)
            counts = np.array(distributed.all_reduce_sum(self.world, np.asarray(of_rank).tolist()))
            losses = losses + term.weight * sums / np.maximum(1.0, counts)
            labels = labels + counts
        losses = np.where(labels > 0, losses, np.nan)  # of a source without labels in this step
        tokens, epochs = self.order.source_tokens(state.samples), self.order.epochs(state.samples)
        values: dict[str, Any] = {}
        for number, source in enumerate(self.config.data.train):
            values[f"source/{source.label}/loss"] = float(losses[number])
            values[f"source/{source.label}/epochs"] = epochs[number]
            values[f"source/{source.label}/tokens"] = tokens[number]
        return values
