"""The loop: step, log, evaluate, save, stop."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint.restore import restore
from trainer.checkpoint.rollback import last_good, leave_branch
from trainer.checkpoint.save import Saver, not_saved
from trainer.config import Config
from trainer.data.batch import Batch
from trainer.data.order.permutation import KeyPurpose, fold_key
from trainer.data.order.run_order import RunOrder
from trainer.divergence import DivergenceWatch, make_final_error
from trainer.engine.engine import TrainingEngine
from trainer.engine.read_later import read_later
from trainer.errors import EXIT_FINISHED, EXIT_STOPPED_AFTER_SAVING, DivergenceError, MaskwrightError
from trainer.evaluation.evaluator import Evaluator
from trainer.evaluation.in_training import LOSS, Evaluations
from trainer.liveness.activity import Activity
from trainer.liveness.rank_timer import RankTimer
from trainer.liveness.watchdog import Limits
from trainer.objectives.objective import Criterion, loss_sums, loss_to_differentiate, share_of_loss
from trainer.runtime import distributed
from trainer.runtime.agreement import Agreement
from trainer.runtime.distributed import World
from trainer.runtime.signals import StopRequest
from trainer.schedule.batch_plan import BatchPlan, StepShape
from trainer.schedule.learning_rate import learning_rate
from trainer.state import TrainState
from trainer.tracking.console import TrainingConsole, step_line
from trainer.tracking.metrics import ThroughputMeter, counters
from trainer.tracking.profiler import StepProfiler
from trainer.tracking.reporter import Reporter
from trainer.tracking.training_metrics import StepMetrics

logger = logging.getLogger(__name__)


@dataclass
class Loop:
    """One run on one rank, from `state` to its end; `reporter` exists on rank 0 only."""

    config: Config
    plan: BatchPlan
    world: World
    engine: TrainingEngine
    criterion: Criterion
    order: RunOrder
    open_batches: Callable[[TrainState], Iterable[Batch]]
    """This rank's micro-batches from a state on."""
    evaluator: Evaluator | None
    saver: Saver
    meter: ThroughputMeter
    state: TrainState
    stop: StopRequest
    activity: Activity
    """Told what this rank is doing."""
    reporter: Reporter | None
    profiler: StepProfiler
    evaluated: bool
    """Whether the evaluation of the step to start from, if one is due there, has been reported."""
    last_save_time: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.watch = DivergenceWatch(self.config.resilience)
        self.step_metrics = StepMetrics(self.config, self.plan, self.world, self.criterion, self.order, self.meter)
        self.rank_timer = RankTimer(self.world.device)
        self.evaluations = Evaluations(self.evaluator, self.config.eval, self.plan.total_steps)
        self.save_due = self.best_is_unsaved = False
        self.loss_to_judge: Callable[[], float] | None = None  # this rank's share of the last step's mean loss

    def run(self) -> int:
        """Train to the last step or to a request to stop; returns the exit code.

        Raises:
            DivergedError: on every rank, when training has diverged and is not to be, or cannot be, rolled back.
        """
        if not self.evaluated:
            self._evaluate_if_due()  # of the untrained model, which all later ones are compared with, or one cut short
        while True:
            try:
                return self._train()
            except DivergenceError as divergence:
                self._roll_back(divergence)

    def _train(self) -> int:
        self.meter.restart()
        # Closing ends the loader and its workers, and writes a trace that is begun.
        with contextlib.closing(self.profiler), contextlib.closing(self._steps_of_batches()) as steps:
            if self.best_is_unsaved:  # begun from another run's checkpoint, it has evaluated that
                self._save(self.config.checkpoint.in_background)
            while self.state.step < self.plan.total_steps and not self.early_end:
                with self.profiler.step(self.state.step + 1):
                    shape = self.plan.shape_at(self.state.samples)
                    micro_batches, agreed = self._agree(next(steps))
                    if agreed.stop:
                        return self._stop()
                    if agreed.clock_says_save:
                        self._save(self.config.checkpoint.in_background)
                    losses = self._train_step(micro_batches, agreed.counts, shape)
                self._step_is_done()
                if self.reporter is not None:
                    self.reporter.step(self.state.step)
                if self._is_due(self.config.logging.every_steps) or self.state.step in (1, self.plan.total_steps):
                    self._log(losses, agreed.counts, micro_batches, shape)
                try:
                    self._evaluate_if_due()
                except MaskwrightError:  # on all ranks: damaged validation data
                    self._finish_save()
                    raise
                self._save_if_due()
        self._save_or_fail()
        if self.reporter is not None:
            tokens = self.state.tokens - self.state.skipped_tokens(self.order.phases.tokens)
            self.reporter.finished(self.state, tokens, self.early_end)
        return EXIT_FINISHED

    def dry_run(self, console: TrainingConsole) -> int:
        """Do a real optimizer step of each phase and one evaluation, and write nothing; shows that everything fits."""
        for phase in self.order.phases:
            self.state = TrainState(samples=phase.first_sample)
            values = self._dry_step()
            of_phase = f" of {phase.seq_len} tokens a block" if len(self.order.phases) > 1 else ""
            console.say(f"step 1 of {self.plan.total_steps}{of_phase}  {step_line(values, self.plan)}")
        evaluation = self.evaluator.run(self.engine, self.world) if self.evaluator is not None else None
        if evaluation is not None:
            console.say(f"evaluation  loss {evaluation['eval/loss']:.4f}")
        console.say("dry run passed; nothing was saved")
        return EXIT_FINISHED

    def _dry_step(self) -> dict[str, Any]:
        """Do one step from the present sample on; returns its training line."""
        self.meter.restart()
        shape = self.plan.shape_at(self.state.samples)
        micro_batches, agreed = self._agree(next(self._steps_of_batches()))
        try:
            losses = self._train_step(micro_batches, agreed.counts, shape)
            return self._read(losses, agreed.counts, micro_batches, shape)
        except DivergenceError as divergence:
            raise make_final_error(divergence, self.config.resilience, rollbacks=0) from None

    def _steps_of_batches(self) -> Generator[list[Batch] | MaskwrightError]:
        """Yield the loader's micro-batches, those of one optimizer step at a time, or why they cannot be read."""
        loader = iter(self.open_batches(self.state))
        while True:
            self.activity.enter("data")
            start = time.perf_counter()
            try:
                with self.profiler.range("data"):
                    accumulation = self.plan.shape_at(self.state.samples).accumulation
                    micro_batches = [next(loader) for _ in range(accumulation)]
            except MaskwrightError as error:
                yield error
                return
            self.meter.waited(time.perf_counter() - start)
            self.rank_timer.read_data(time.perf_counter() - start)
            self.activity.progress()
            yield micro_batches

    def _agree(self, micro_batches: list[Batch] | MaskwrightError) -> tuple[list[Batch], Agreement]:
        """Agree by one small reduction a step: counts of its batch, stop or not, save by the clock or not, last loss.

        Raises:
            DivergenceError: on every rank, when that loss is above its bound.
            MaskwrightError: on every rank, when one of them could not read its part of the batch. What has been
                trained is saved first.
        """
        minutes = self.config.checkpoint.every_minutes
        elapsed_minutes = (time.monotonic() - self.last_save_time) / 60
        clock_says_save = self.world.is_main and minutes is not None and elapsed_minutes >= minutes
        error = micro_batches if isinstance(micro_batches, MaskwrightError) else None
        batches = [] if isinstance(micro_batches, MaskwrightError) else micro_batches
        agreed = Agreement(
            stop=self.stop.received,
            clock_says_save=clock_says_save and self.state.skipped_in_a_row == 0,
            failed=error is not None,
            loss=self.loss_to_judge() if self.loss_to_judge is not None else 0.0,
            written=self.saver.is_written,
            counts=[sum(batch.count(term.name) for batch in batches) for term in self.criterion.terms],
        ).over(self.world)
        self.activity.enter("step")
        if agreed.written == self.world.size:
            self._finish_save()
        self._judge_loss(agreed.loss)
        if agreed.failed:
            self._fail_together(error)
        return batches, agreed

    def _fail_together(self, error: MaskwrightError | None) -> None:
        """Save, and raise the error of the rank that has one on all of them."""
        if error is not None:
            error.where = f"{error.where} (rank {self.world.rank})"
        if self.state.step > 0:
            self._save(in_background=False)
        distributed.raise_on_all_ranks(self.world, error)

    def _train_step(self, micro_batches: list[Batch], counts: list[float], shape: StepShape) -> torch.Tensor:
        """Do one optimizer step; returns this rank's sums of losses [terms, sources], on the device.

        Args:
            counts: of the labels of each term in the global batch.
        """
        step = self.state.step + 1
        phase, optimizer, schedule = self.order.phases[shape.phase], self.config.optimizer, self.config.schedule
        rate = learning_rate(step, optimizer.lr, self.plan.total_steps, schedule, phase.lr_factor)
        terms, averaged = self.criterion.terms, self.world.size * shape.accumulation  # by DeepSpeed
        self.engine.begin_step(shape.micro_size, shape.accumulation, phase.rope_theta)
        source_count = self.order.source_count
        sums = torch.zeros(len(terms), source_count, device=self.engine.device)
        applied, max_grad_norm = True, self.watch.max_grad_norm(self.state)
        for number, batch in enumerate(micro_batches):
            key = fold_key(KeyPurpose.DROPOUT, self.config.run.seed, step, number, self.world.rank)
            self.engine.seed_dropout(int(key) >> 1)  # a function of the step: it needs no state
            if self.config.model.compile:
                self.activity.compiles(batch.shapes)
            with self.profiler.range("forward"):
                moved = batch.to(self.engine.device)
                with self.rank_timer.forward():
                    losses = loss_sums(self.criterion, self.engine.network, moved, source_count)
            with self.profiler.range("backward"):
                self.engine.backward(loss_to_differentiate(terms, losses, counts, averaged))
            sums += losses.detach()
            if self.watch.needs_loss and number == len(micro_batches) - 1:
                # Before the step, in which DeepSpeed waits for the device: after it the copy is there.
                self.loss_to_judge = read_later(share_of_loss(terms, sums, counts))
            with self.profiler.range("optimizer"):
                applied = self.engine.step(rate, max_grad_norm)
            self.activity.progress()
        self.state.advance(shape.global_size, shape.seq_len, applied)
        head_rows = self.world.size * sum(batch.head_rows for batch in micro_batches)
        self.meter.trained(shape.tokens, head_rows, shape.phase)
        if not applied:
            self.loss_to_judge = None
            self._report_skip(max_grad_norm, shape)
        self.watch.observe_step(self.state, self.engine.grad_norm if max_grad_norm is not None else None)
        return sums

    def _step_is_done(self) -> None:
        if not self.activity.is_started:  # what only a start does, such as compiling, is done
            limits = Limits.of(self.config.watchdog)
            distributed.set_timeouts(limits.of_decisions, limits.of_gradients)
        self.activity.at_step(self.state.step)

    def _judge_loss(self, loss: float) -> None:
        """Judge the mean loss of the last step, if it is still to be judged."""
        if self.loss_to_judge is not None:
            self.loss_to_judge = None
            self.watch.observe_loss(self.state, loss)

    def _report_skip(self, max_grad_norm: float | None, shape: StepShape) -> None:
        norm, reason = self.engine.grad_norm, "a loss or a gradient is not finite"
        if math.isfinite(norm):
            reason = f"the gradient norm is {norm:.4g}, above {max_grad_norm:.4g}"
        self._report_event("skip", reason, self.state.samples - shape.global_size, self.state.samples)

    def _report_event(self, kind: str, reason: str, first: int, end: int, from_step: int | None = None) -> None:
        """Report what happened to the samples from `first` up to `end`, at the present step."""
        step = self.state.step if from_step is None else from_step
        text = f"{kind} at step {step}: {reason} (samples t = {first:,} to {end - 1:,})"
        logger.warning("%s", text)
        if self.reporter is not None:
            event = {"event": kind, "event/reason": reason, "event/first_sample": first, "event/end_sample": end}
            self.reporter.event({**counters(self.state), **event, "event/from_step": step}, text)

    def _roll_back(self, divergence: DivergenceError) -> None:
        """Load the last good checkpoint and go on behind the data consumed since.

        Raises:
            DivergedError: when that is not wanted, was done too often, or there is no such checkpoint.
        """
        settings, run_dir, state = self.config.resilience, self.saver.run_dir, self.state
        self.loss_to_judge, self.save_due, self.best_is_unsaved = None, False, False
        self._finish_save()
        self.saver.check_lock()
        found = None
        if settings.on_divergence == "rollback" and len(state.rollbacks) < settings.max_rollbacks:
            found = last_good(self.world, run_dir, state, divergence.onset)
        if found is None:
            self._report_event("diverged", divergence.reason, state.begun_at, state.samples)
            raise make_final_error(divergence, settings, len(state.rollbacks))
        folder, manifest = found
        saved = TrainState(**manifest.state)
        self.state = state.rolled_back_to(saved, divergence.reason)
        rewind = (lambda: None) if self.reporter is None else partial(self.reporter.rewind, saved.step)
        moved = leave_branch(self.world, run_dir, folder, manifest, self.state, self.saver.records.data_order, rewind)
        with self.activity.within("start"):
            restore(self.engine, folder, self.world)
            self.engine.set_rope_theta(self.order.phases.rope_theta_after(saved.samples))
        self.saver.resumed(folder, saved.step)
        self._report_event("rollback", divergence.reason, saved.samples, state.samples, from_step=state.step)
        if self.reporter is not None:
            self.reporter.went_back(folder, moved)

    def _is_due(self, every_steps: int | str | None) -> bool:  # a resolved config has no auto left
        return isinstance(every_steps, int) and self.state.step % every_steps == 0

    def _read(
        self, loss_sums: torch.Tensor, counts: list[float], micro_batches: list[Batch], shape: StepShape
    ) -> dict[str, Any]:
        """Read the training line of the step that was just done."""
        of_engine = self.engine.grad_norm, self.engine.loss_scale
        return self.step_metrics.read(self.state, loss_sums, counts, micro_batches, shape, *of_engine)

    def _log(self, loss_sums: torch.Tensor, counts: list[float], micro_batches: list[Batch], shape: StepShape) -> None:
        values = self._read(loss_sums, counts, micro_batches, shape)
        rank_times = distributed.all_gather_floats(self.world, self.rank_timer.take())
        if self.reporter is not None:
            self.reporter.training(values)
            self.reporter.rank_times(rank_times)
        self.meter.restart()

    def _evaluate_if_due(self) -> None:
        if not self.evaluations.is_due(step := self.state.step):
            return
        with self.activity.within("evaluate"):
            if self.config.model.compile:
                self.activity.compiles("evaluation")
            values = self.evaluations.run(step, self.engine, self.world, self.stop, self.activity.progress)
        if values is not None:
            is_best = self.state.judge(values[LOSS], self.evaluations.blocks) and self.config.checkpoint.keep_best
            self.best_is_unsaved = is_best and step not in (0, self.saver.saved_step)
            self.saver.amend(self.state)
            line = {**counters(self.state), **values, **self.order.phases.evaluated_at(self.state.samples)}
            if self.reporter is not None:
                self.reporter.evaluation(line, self.criterion.describe(values), self.state, self.evaluations.examples)
        self.meter.restart()

    @property
    def early_end(self) -> str:
        """Why training ends before its last step; empty while it goes on."""
        return self.state.early_end(self.plan.total_steps, self.config.eval.patience)

    def _save_if_due(self) -> None:
        """Save by the step; while steps are skipped it is put off: they change nothing, and push out older ones."""
        self.save_due = self.save_due or self._is_due(self.config.checkpoint.every_steps)
        is_due = self.best_is_unsaved or (self.save_due and self.state.skipped_in_a_row == 0)
        if is_due and self.state.step < self.plan.total_steps:
            self._save(self.config.checkpoint.in_background)

    def _save(self, in_background: bool) -> bool:
        """Save what has been judged, when an earlier save is finished; returns False when that failed.

        Raises:
            DivergenceError: on every rank, when it is not good.
        """
        if self.loss_to_judge is not None:
            self._judge_loss(distributed.all_reduce_sum(self.world, [self.loss_to_judge()])[0])
        self.save_due = self.best_is_unsaved = False
        self._finish_save()
        is_saved = self.saver.saved_step == self.state.step
        with self._saving():
            if in_background:
                self.saver.begin(self.state)
                return True
            saved = self.saver.save(self.state)
        if not is_saved:
            self._report_saved(saved)
        return saved is not None

    def _finish_save(self) -> None:
        """Commit what is being written in the background, if anything is."""
        with self._saving():
            saved = self.saver.finish()
        self._report_saved(saved)

    def _report_saved(self, saved: Path | None) -> None:
        if saved is not None and self.reporter is not None:
            self.reporter.saved(saved)

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """Measure the time in which training stands still for a save."""
        start = time.perf_counter()
        with self.activity.within("save"):
            yield
        self.last_save_time = time.monotonic()
        self.meter.saved(time.perf_counter() - start)

    def _save_or_fail(self) -> None:
        """Make the save that nothing follows, or raise: to end as if it had worked would lose the run."""
        if not self._save(in_background=False):
            raise not_saved(self.state.step, self.saver.run_dir)

    def _stop(self) -> int:
        self._save_or_fail()
        if self.reporter is not None:
            self.reporter.stopped(self.state.step, self.stop.reason)
        return EXIT_STOPPED_AFTER_SAVING
