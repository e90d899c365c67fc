"""The training line of metrics.jsonl: reduced over the ranks and read from the device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trainer.config import Config
from trainer.data.batch import Batch
from trainer.data.order.run_order import RunOrder
from trainer.engine.engine import TrainingEngine
from trainer.objectives.mlm import MaskedLanguageModelling
from trainer.runtime import distributed
from trainer.runtime.distributed import World
from trainer.schedule.batch_plan import BatchPlan, StepShape
from trainer.schedule.learning_rate import learning_rate
from trainer.state import TrainState
from trainer.tracking.metrics import ThroughputMeter, counters, peak_memory_gib


@dataclass(frozen=True)
class StepMetrics:
    """Fills TRAINING_METRICS, BATCH_METRICS and SOURCE_METRICS of trainer.tracking.metrics; every rank calls it."""

    config: Config
    plan: BatchPlan
    world: World
    engine: TrainingEngine
    objective: MaskedLanguageModelling
    order: RunOrder
    meter: ThroughputMeter

    def read(
        self,
        state: TrainState,
        loss_sums: torch.Tensor,
        predictions: float,
        micro_batches: list[Batch],
        shape: StepShape,
    ) -> dict[str, Any]:
        """Reduce and read; the only place where the host waits for the device.

        Args:
            state: after the step.
            loss_sums: of this rank's cross-entropies in the step, by source, nats.
            predictions: in the global batch.
            micro_batches: of this rank in the step.
            shape: of the step.
        """
        totals = distributed.total(self.world, loss_sums.tolist())
        loss = sum(totals) / max(1.0, predictions)
        rate = learning_rate(state.step, self.config.optimizer.lr, self.plan.total_steps, self.config.schedule)
        return {
            **counters(state),
            "train/loss": loss,
            "train/learning_rate": rate,
            "train/grad_norm": self.engine.grad_norm,
            "train/skipped_steps": state.skipped_steps,
            "train/loss_scale": self.engine.loss_scale,
            "resilience/rollbacks": len(state.rollbacks),
            "resilience/skipped_samples": state.skipped_samples,
            "train/epoch": max(self.order.epochs(state.samples)),
            **self.meter.read(),
            "memory/peak_gib": max(distributed.gather(self.world, peak_memory_gib(self.engine.device))),
            **(self._batch_values(shape) if self.plan.sizes_vary else {}),
            **(self._source_values(state, totals, micro_batches) if len(totals) > 1 else {}),
        }

    def _batch_values(self, shape: StepShape) -> dict[str, Any]:
        return {"batch/global_size": shape.global_size, "batch/seq_len": shape.seq_len}

    def _source_values(self, state: TrainState, loss_totals: list[float], micro_batches: list[Batch]) -> dict[str, Any]:
        """Loss of the step, epochs and tokens of each source; `loss_totals` are over all ranks."""
        of_rank = sum(self.objective.predictions_by_source(batch, len(loss_totals)) for batch in micro_batches)
        predictions = distributed.total(self.world, np.asarray(of_rank).tolist())
        tokens, epochs = self.order.source_tokens(state.samples), self.order.epochs(state.samples)
        values: dict[str, Any] = {}
        for number, source in enumerate(self.config.data.train):
            loss = loss_totals[number] / predictions[number] if predictions[number] else math.nan
            values[f"source/{source.label}/loss"] = loss
            values[f"source/{source.label}/epochs"] = epochs[number]
            values[f"source/{source.label}/tokens"] = tokens[number]
        return values
