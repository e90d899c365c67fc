"""Which share of the units one of several tasks writes: `--task I/N`, or the place in a SLURM job array."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tools.prepare.plan import Unit
from trainer.errors import UserError


@dataclass(frozen=True)
class Share:
    """Task `task`, from 0, of `tasks`.

    Raises:
        UserError: when there is no such task.
    """

    task: int
    tasks: int

    def __post_init__(self) -> None:
        if not 0 <= self.task < self.tasks:
            last = f"Tasks count from 0: the last of {self.tasks} is {self.tasks - 1}/{self.tasks}."
            raise UserError(
                f"There is no task {self}.",
                where=f"--task {self}",
                remedy=last if self.tasks > 0 else "Give --task I/N with N tasks, I from 0 to N-1.",
            )

    def __str__(self) -> str:
        return f"{self.task}/{self.tasks}"

    def of(self, units: Sequence[Unit]) -> Sequence[Unit]:
        """Take every N-th unit: neighbours, which are alike in size, go to different tasks."""
        return units[self.task :: self.tasks]


def choose_share(task: str | None, finalize: bool, environ: Mapping[str, str]) -> Share | None:
    """Choose the share to write: what `--task` says, else this element of a SLURM job array; None for all of it.

    Raises:
        UserError: for a task that cannot be, and for `--task` with `--finalize`.
    """
    if finalize and task is not None:
        raise UserError(
            "--task and --finalize exclude each other.",
            where=f"--task {task} --finalize",
            remedy="Run all tasks first, then the same command with --finalize alone.",
        )
    if finalize:
        return None
    return parse_share(task) if task is not None else find_job_array_share(environ)


def parse_share(text: str) -> Share:
    """Read `I/N`.

    Raises:
        UserError: for anything else.
    """
    match = re.fullmatch("([0-9]{1,9})/([0-9]{1,9})", text)
    if match is None:
        raise UserError(
            f"'{text}' is no task.", where=f"--task {text}", remedy="Give --task I/N, such as 0/8 for the first of 8."
        )
    return Share(int(match[1]), int(match[2]))


def find_job_array_share(environ: Mapping[str, str]) -> Share | None:
    """Find the share of this element of a SLURM job array; None outside one.

    Raises:
        UserError: for an array whose numbers are not evenly spaced: a gap in it would leave units out; and where a
            variable is missing or no number.
    """
    if "SLURM_ARRAY_TASK_ID" not in environ:
        return None
    number, count = _of_array(environ, "ID"), _of_array(environ, "COUNT")
    first, step = _of_array(environ, "MIN"), _of_array(environ, "STEP", 1) or 1
    last = _of_array(environ, "MAX", first + (count - 1) * step)
    if (last - first) != (count - 1) * step or (number - first) % step:
        raise UserError(
            f"The job array has {count} tasks from {first} to {last}, which are not evenly spaced.",
            where=f"SLURM_ARRAY_TASK_ID={number}",
            remedy="Give sbatch a plain range (--array=0-7), or say which share this is with --task I/N.",
        )
    return Share((number - first) // step, count)


def _of_array(environ: Mapping[str, str], what: str, default: int | None = None) -> int:
    name = f"SLURM_ARRAY_TASK_{what}"
    text = environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not re.fullmatch("[0-9]{1,9}", text):
        raise UserError(
            f"{name} is no number, so which share this is cannot be told.",
            where=f"{name}={text or ''}",
            remedy="Say which with --task I/N, or unset SLURM_ARRAY_TASK_ID outside a job array.",
        )
    return int(text)
