"""Everything rank 0 reports, in one place: metrics.jsonl, examples.jsonl, TensorBoard, the console and status.json."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.config import Config
from trainer.config.file import dump_config
from trainer.errors import cannot_write
from trainer.schedule.batch_plan import BatchPlan
from trainer.state import TrainState
from trainer.tracking.console import TrainingConsole, evaluation_line, seconds_left
from trainer.tracking.jsonl import JsonlWriter
from trainer.tracking.metrics import as_json
from trainer.tracking.status import StatusWriter, best_of
from trainer.tracking.tensorboard import TensorBoardWriter

logger = logging.getLogger(__name__)


class Reporter:
    """Rank 0's reports of one run."""

    def __init__(
        self,
        run_dir: Path,
        console: TrainingConsole,
        status: StatusWriter,
        find_stragglers: Callable[[list[list[float]], float], str | None] | None,
        plan: BatchPlan,
        resumed_step: int | None,
        config: Config,
    ) -> None:
        self.console, self.status, self._find_stragglers = console, status, find_stragglers
        self._run_dir, self._plan, self._config = run_dir, plan, config
        try:
            self._open(resumed_step)
        except OSError as error:
            raise cannot_write(Path(error.filename or run_dir), run_dir, error) from None

    def _open(self, resumed_step: int | None, keep_events: bool = False) -> None:
        self._jsonl = JsonlWriter(self._run_dir / "metrics.jsonl", resumed_step, keep_events)
        self._tensorboard = None
        if self._config.logging.tensorboard:
            folder = self._run_dir / "tensorboard"
            self._tensorboard = TensorBoardWriter(folder, resumed_step, dump_config(self._config))
        path = self._run_dir / "examples.jsonl"  # only of a run that has evaluations
        self._examples = JsonlWriter(path, resumed_step) if path.exists() else None
        self.console.start(resumed_step or 0, self._plan)

    def rewind(self, step: int) -> None:
        """Take back what was reported of the steps after `step`, but for the events: they are done again.

        Raises:
            OSError: when the disk is full.
        """
        self.close()
        self._open(step, keep_events=True)

    def step(self, step: int) -> None:
        """Count a step on the progress bar."""
        self.console.step(step)

    def training(self, values: dict[str, Any]) -> None:
        """Report a training line (names in trainer.tracking.metrics)."""
        values = self._write(values)
        self.console.training_line(values)
        self.status.progress(
            **{name: values[name] for name in ("step", "samples", "tokens")},
            train_loss=values["train/loss"],
            tokens_per_second=values["throughput/tokens_per_second"],
            eta_seconds=seconds_left(values, self._plan),
        )

    def evaluation(self, values: dict[str, Any], found: str, state: TrainState, examples: list[dict[str, Any]]) -> None:
        """Report an evaluation.

        Args:
            values: its line of metrics.
            found: what it has found beside the loss, for the console.
            state: in which it is judged.
            examples: what the model told of the first samples; empty where none is shown.
        """
        self._write(values)
        if examples:
            self._write_examples({"step": values["step"], "examples": examples})
        self.status.progress(**best_of(state))
        judged = ""
        if self._config.eval.patience is not None and state.evaluations_since_best:
            judged = f"  ({state.evaluations_since_best} of {self._config.eval.patience} that are no better)"
        self.console.say(evaluation_line(values, found) + judged)

    def saved(self, folder: Path) -> None:
        """Report a checkpoint."""
        self.status.progress(last_checkpoint=folder.name)
        self.console.say(f"saved {folder}")

    def event(self, values: dict[str, Any], line: str) -> None:
        """Report an event of EVENT_METRICS, and say `line`."""
        self._write(values)
        self.console.say(line)

    def went_back(self, folder: Path, moved: Path) -> None:
        """Say which checkpoint a rollback has loaded, and where lies what it has left."""
        self.console.say(f"went back to {folder.name}, on behind these samples; what was left is in {moved}")

    def stopped(self, step: int, reason: str) -> None:
        """Say that training has stopped on request, after saving."""
        self.console.say(f"stopped at step {step} on {reason}; the same command goes on from here")

    def finished(self, state: TrainState, tokens: int, early_end: str) -> None:
        """Say that training is done, and what comes next.

        Args:
            tokens: that were trained on.
            early_end: why that is before the last step; empty when it is not.
        """
        folder, best = self._run_dir, " --best" if self._converts_best(state) else ""
        done = f"{early_end}; {tokens:,} tokens" if early_end else f"finished: {state.step} steps, {tokens:,} tokens"
        self.console.say(f"{done}. The model: maskwright convert {folder}{best} --output {folder.name}-model")

    def _converts_best(self, state: TrainState) -> bool:
        """Tell whether the best checkpoint was kept, and is not the last one."""
        return self._config.checkpoint.keep_best and state.best_step not in (None, 0, state.step)

    def rank_times(self, seconds: list[list[float]]) -> None:
        """Say, now and then, which ranks hold up the others; `seconds` as in `trainer.liveness.stragglers`."""
        if self._find_stragglers is not None and (line := self._find_stragglers(seconds, time.monotonic())):
            logger.info("%s", line)
            self.console.say(line)

    def close(self) -> None:
        self.console.stop()
        for writer in (self._jsonl, self._examples, self._tensorboard):
            try:
                if writer is not None:
                    writer.close()
            except OSError as error:
                logger.warning("the last metrics are not written: %s", error.strerror)

    def _write(self, values: dict[str, Any]) -> dict[str, Any]:
        """Write to the files; a full disk costs lines, not the run."""
        values = as_json(values)
        try:
            self._jsonl.write(values)
            if self._tensorboard is not None:
                self._tensorboard.write(values, values["step"])
        except OSError as error:
            logger.warning("the metrics of step %d are not all written: %s", values["step"], error.strerror)
        return values

    def _write_examples(self, line: dict[str, Any]) -> None:
        """Write a line of examples; a full disk costs it."""
        try:
            self._examples = self._examples or JsonlWriter(self._run_dir / "examples.jsonl", resumed_step=None)
            self._examples.write(line)
        except OSError as error:
            logger.warning("the examples of step %d are not all written: %s", line["step"], error.strerror)
