"""What the user sees while training: one line an interval, and on a terminal a progress bar below."""

from __future__ import annotations

import logging
import math
from datetime import timedelta
from typing import Any, TextIO

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from trainer.config import RopeTheta
from trainer.runtime.rich_console import PlainConsole
from trainer.runtime.streams import first_loss
from trainer.schedule.batch_plan import BatchPlan

logger = logging.getLogger(__name__)


class TrainingConsole:
    """Rank 0's view of a run, written to `stream`; that of the other ranks is silent."""

    def __init__(self, stream: TextIO, is_silent: bool = False) -> None:
        self._rich = PlainConsole(file=stream, highlight=False, soft_wrap=True, quiet=is_silent)
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._plan: BatchPlan | None = None
        self._lost = False

    def say(self, line: str) -> None:
        """Print one line. Where the console cannot be written the line is lost, but not the run."""
        self._rich.print(line, markup=False)
        if not self._lost and (error := first_loss(self._rich.file)) is not None:
            self._lost = True
            logger.info("the console cannot be written (%s); the run goes on without it", error.strerror)

    def start(self, step: int, plan: BatchPlan) -> None:
        """Begin to show progress: a bar, on a terminal."""
        self._plan = plan
        if self._rich.is_terminal:
            columns = (
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, console=self._rich)
            self._task = self._progress.add_task("", total=plan.total_steps, completed=step)
            self._progress.start()

    def step(self, step: int) -> None:
        """Move the bar; nothing to show off a terminal."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def training_line(self, values: dict[str, Any]) -> None:
        """Show one metrics line: always the same order, so that it can be searched."""
        assert self._plan is not None
        self.say(f"step {values['step']}/{self._plan.total_steps}  {step_line(values, self._plan)}")

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def seconds_left(values: dict[str, Any], plan: BatchPlan) -> float:
    """Estimate the time to the last step at the speed of a training line."""
    tokens_left = plan.tokens_ahead(values["samples"], plan.total_steps - values["step"])
    return tokens_left / values["throughput/tokens_per_second"]


def step_line(values: dict[str, Any], plan: BatchPlan) -> str:
    """Write a line of loss, lr, grad_norm, tokens/s, MFU, data wait, peak memory, time left."""
    skipped = f"  skipped {values['train/skipped_steps']}" if values["train/skipped_steps"] else ""
    return (
        f"loss {_number(values['train/loss'], '.4f')}  lr {values['train/learning_rate']:.2e}  "
        f"grad_norm {_number(values['train/grad_norm'], '.3f')}  "
        f"{values['throughput/tokens_per_second']:,.0f} tokens/s  mfu {_share(values['throughput/mfu'])}  "
        f"wait {values['time/data_wait_fraction']:.1%}  peak {values['memory/peak_gib']:.2f} GiB{skipped}  "
        f"eta {timedelta(seconds=round(seconds_left(values, plan)))}"
    )


def evaluation_line(values: dict[str, Any], found: str) -> str:
    """Write a line of an evaluation's loss, what the criterion has found, and what the probe has."""
    line = f"evaluation at step {values['step']}  loss {values['eval/loss']:.4f}  {found}"
    if "eval/seq_len" in values:  # the run has phases
        line += f"  (blocks of {values['eval/seq_len']:,}"
        line += f", rope theta {RopeTheta.of(values, 'eval/')})" if "eval/rope_theta" in values else ")"
    if "eval/probe/accuracy" not in values:
        return line
    names = ("accuracy", "accuracy_std", "macro_f1")
    accuracy, spread, f1 = (_number(values[f"eval/probe/{name}"], ".3f") for name in names)
    return f"{line}  probe accuracy {accuracy} ± {spread} F1 {f1} (majority {values['eval/probe/majority']:.3f})"


def _share(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.1%}"


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)
