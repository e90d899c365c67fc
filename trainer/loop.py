"""The loop: step, log, evaluate, save, stop."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from trainer import distributed
from trainer.batch_plan import BatchPlan
from trainer.checkpoint.commit import Saver
from trainer.config import Config
from trainer.data.order import SampleOrder
from trainer.data.permutation import KeyPurpose, fold_key
from trainer.distributed import World
from trainer.engine import TrainingEngine
from trainer.errors import EXIT_FINISHED, EXIT_STOPPED_AFTER_SAVING, DivergedError, MaskwrightError
from trainer.evaluate import Evaluator
from trainer.metrics import ThroughputMeter, counters, peak_memory_gib
from trainer.objectives.mlm import Batch, MaskedLanguageModelling
from trainer.schedule import learning_rate
from trainer.signals import StopRequest
from trainer.state import TrainState
from trainer.tracking.console import TrainingConsole, describe
from trainer.tracking.reporter import Reporter

logger = logging.getLogger(__name__)


@dataclass
class Loop:
    """One run on one rank, from `state` to its end; `reporter` exists on rank 0 only."""

    config: Config
    plan: BatchPlan
    world: World
    engine: TrainingEngine
    objective: MaskedLanguageModelling
    order: SampleOrder
    batches: Iterable[Batch]
    evaluator: Evaluator | None
    saver: Saver
    meter: ThroughputMeter
    state: TrainState
    stop: StopRequest
    reporter: Reporter | None
    evaluated: bool
    """Whether the evaluation of the step to start from, if one is due there, has been reported."""
    last_save_time: float = field(default_factory=time.monotonic)

    def run(self) -> int:
        """Train to the last step or to a request to stop; returns the exit code."""
        if not self.evaluated:
            self._evaluate_if_due()  # of the untrained model, which all later ones are compared with, or one cut short
        steps = self._steps_of_batches()
        self.meter.restart(self.state.tokens)
        while self.state.step < self.plan.total_steps:
            micro_batches, predictions, stop, save_due = self._agree(next(steps))
            if stop:
                return self._stop()
            if save_due:
                self._save()
            losses = self._train_step(micro_batches, predictions)
            self._give_up_if_diverged()
            if self.reporter is not None:
                self.reporter.step(self.state.step)
            if self._is_due(self.config.logging.every_steps) or self.state.step in (1, self.plan.total_steps):
                self._log(losses, predictions, micro_batches)
            self._evaluate_if_due()
            if self._is_due(self.config.checkpoint.every_steps) and self.state.step < self.plan.total_steps:
                self._save()
        self._save_or_fail()
        if self.reporter is not None:
            run_dir = self.saver.run_dir
            self.reporter.console.say(
                f"finished: {self.state.step} steps, {self.state.tokens:,} tokens. "
                f"The model: maskwright convert {run_dir} --output {run_dir.name}-model"
            )
        return EXIT_FINISHED

    def dry_run(self, console: TrainingConsole | None) -> int:
        """One real optimizer step and one evaluation, nothing written; shows that everything fits together."""
        self.meter.restart(self.state.tokens)
        micro_batches, predictions, _, _ = self._agree(next(self._steps_of_batches()))
        values = self._training_values(self._train_step(micro_batches, predictions), predictions, micro_batches)
        evaluation = self.evaluator.run(self.engine, self.world) if self.evaluator is not None else None
        if console is not None:
            console.say(f"step 1 of {self.plan.total_steps}  {describe(values, self.plan.total_steps)}")
            if evaluation is not None:
                console.say(f"evaluation  loss {evaluation['eval/loss']:.4f}")
            console.say("dry run passed; nothing was saved")
        return EXIT_FINISHED

    def _steps_of_batches(self) -> Iterator[list[Batch] | MaskwrightError]:
        """The loader's micro-batches, those of one optimizer step at a time, or why they cannot be read."""
        loader = iter(self.batches)
        while True:
            start = time.perf_counter()
            try:
                micro_batches = [next(loader) for _ in range(self.plan.accumulation)]
            except MaskwrightError as error:
                yield error
                return
            self.meter.waited(time.perf_counter() - start)
            yield micro_batches

    def _agree(self, micro_batches: list[Batch] | MaskwrightError) -> tuple[list[Batch], float, bool, bool]:
        """One small reduction a step: predictions in the global batch, stop or not, save by the clock or not.

        Raises:
            MaskwrightError: on every rank, when one of them could not read its part of the batch. What has been
                trained is saved first.
        """
        minutes = self.config.checkpoint.every_minutes
        elapsed_minutes = (time.monotonic() - self.last_save_time) / 60
        clock_says_save = self.world.is_main and minutes is not None and elapsed_minutes >= minutes
        error = micro_batches if isinstance(micro_batches, MaskwrightError) else None
        batches = [] if isinstance(micro_batches, MaskwrightError) else micro_batches
        predictions = sum(self.objective.predictions(batch) for batch in batches)
        votes = [predictions, self.stop.received, clock_says_save, error is not None]
        totals = distributed.total(self.world, votes)
        if totals[3]:
            self._fail_together(error)
        return batches, totals[0], totals[1] > 0, totals[2] > 0

    def _fail_together(self, error: MaskwrightError | None) -> None:
        """Save, and raise the error of the rank that has one on all of them."""
        if error is not None:
            error.where = f"{error.where} (rank {self.world.rank})"
        if self.state.step > 0:
            self._save()
        distributed.raise_together(self.world, error)

    def _train_step(self, micro_batches: list[Batch], predictions: float) -> torch.Tensor:
        """One optimizer step; returns this rank's sums of cross-entropies of each source, on the device."""
        step = self.state.step + 1
        rate = learning_rate(step, self.config.optimizer.lr, self.plan.total_steps, self.config.schedule)
        # DeepSpeed averages over ranks and micro-batches; this makes it the mean over all predictions.
        scale = self.world.size * self.plan.accumulation / max(1.0, predictions)
        source_count = len(self.order.blocks)
        loss_sums = torch.zeros(source_count, device=self.engine.device)
        applied = True
        for number, batch in enumerate(micro_batches):
            key = fold_key(KeyPurpose.DROPOUT, self.config.run.seed, step, number, self.world.rank)
            torch.manual_seed(int(key) >> 1)  # dropout is a function of the step: it needs no state
            moved = self.objective.to_device(batch, self.engine.device)
            losses = self.objective.loss_sums(self.engine.network, moved, source_count)
            self.engine.backward(losses.sum() * scale)
            loss_sums += losses.detach()
            applied = self.engine.step(rate)
        self.state.advance(self.plan.global_size, self.plan.seq_len, applied)
        if not applied:
            logger.warning("step %d skipped: a gradient is not finite", step)
        return loss_sums

    def _give_up_if_diverged(self) -> None:
        limit = self.config.train.max_skipped_steps
        if self.state.skipped_in_a_row >= limit:
            raise DivergedError(
                f"Gradients were not finite in {limit} steps in a row, up to step {self.state.step}.",
                where=f"train.max_skipped_steps={limit}",
                remedy="Lower optimizer.lr or lengthen schedule.warmup_steps, and resume: the last checkpoint is good.",
            )

    def _is_due(self, every_steps: int | None) -> bool:
        return every_steps is not None and self.state.step % every_steps == 0

    def _log(self, loss_sums: torch.Tensor, predictions: float, micro_batches: list[Batch]) -> None:
        values = self._training_values(loss_sums, predictions, micro_batches)
        if self.reporter is not None:
            self.reporter.training(values)
        self.meter.restart(self.state.tokens)

    def _training_values(
        self, loss_sums: torch.Tensor, predictions: float, micro_batches: list[Batch]
    ) -> dict[str, Any]:
        """Reduce and read; the only place where the host waits for the device."""
        totals = distributed.total(self.world, loss_sums.tolist())
        loss = sum(totals) / max(1.0, predictions)
        rate = learning_rate(self.state.step, self.config.optimizer.lr, self.plan.total_steps, self.config.schedule)
        return {
            **counters(self.state),
            "train/loss": loss,
            "train/learning_rate": rate,
            "train/grad_norm": self.engine.grad_norm,
            "train/skipped_steps": self.state.skipped_steps,
            "train/loss_scale": self.engine.loss_scale,
            "train/epoch": max(self.order.epochs(self.state.samples)),
            **self.meter.read(self.state.tokens),
            "memory/peak_gib": max(distributed.gather(self.world, peak_memory_gib(self.engine.device))),
            **(self._source_values(totals, micro_batches) if len(totals) > 1 else {}),
        }

    def _source_values(self, loss_totals: list[float], micro_batches: list[Batch]) -> dict[str, Any]:
        """Loss of the step, epochs and tokens of each source; `loss_totals` are over all ranks."""
        of_rank = sum(self.objective.predictions_by_source(batch, len(loss_totals)) for batch in micro_batches)
        predictions = distributed.total(self.world, np.asarray(of_rank).tolist())
        visits, epochs = self.order.visits(self.state.samples), self.order.epochs(self.state.samples)
        values: dict[str, Any] = {}
        for number, source in enumerate(self.config.data.train):
            loss = loss_totals[number] / predictions[number] if predictions[number] else math.nan
            values[f"source/{source.label}/loss"] = loss
            values[f"source/{source.label}/epochs"] = epochs[number]
            values[f"source/{source.label}/tokens"] = visits[number] * self.plan.seq_len
        return values

    def _evaluate_if_due(self) -> None:
        last = self.state.step == self.plan.total_steps
        if self.evaluator is None or not (last or self._is_due(self.config.eval.every_steps)):
            return
        # A request to stop cuts an evaluation short, to be done after the resume; after the last step there is none.
        values = self.evaluator.run(self.engine, self.world, lambda: self.stop.received and not last)
        if values is not None and self.reporter is not None:
            self.reporter.evaluation({**counters(self.state), **values})
        self.meter.restart(self.state.tokens)

    def _save(self) -> bool:
        saved = self.saver.save(self.state)
        self.last_save_time = time.monotonic()
        self.meter.restart(self.state.tokens)
        if saved is not None and self.reporter is not None:
            self.reporter.console.say(f"saved {saved}")
        return saved is not None

    def _save_or_fail(self) -> None:
        """The save that nothing follows: to end as if it had worked would lose the run."""
        if not self._save():
            raise MaskwrightError(
                f"The checkpoint at step {self.state.step} could not be saved, and training ends here.",
                where=str(self.saver.run_dir),
                remedy="Free space or restore access, and start the same command again: it resumes from the last one.",
            )

    def _stop(self) -> int:
        self._save_or_fail()
        name = self.stop.signal_name or "a signal to another rank"
        if self.reporter is not None:
            self.reporter.console.say(
                f"stopped at step {self.state.step} on {name}; the same command goes on from here"
            )
        return EXIT_STOPPED_AFTER_SAVING
