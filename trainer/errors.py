"""The errors that end a command on purpose, each with its exit code.

Every one of them is shown to the user as a short card: what is wrong, the key, file or value it
concerns, and what to do about it. Anything else that escapes is a bug and exits with 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

EXIT_FINISHED = 0
EXIT_UNEXPECTED = 1
EXIT_USER_MISTAKE = 2
EXIT_DAMAGED = 3
EXIT_DIVERGED = 4
EXIT_STOPPED_AFTER_SAVING = 75  # EX_TEMPFAIL: the only code that asks a scheduler to requeue


class MaskwrightError(Exception):
    """Base of the expected errors.

    Args:
        problem: what is wrong, in one sentence.
        where: the offending config key, file or value.
        remedy: what the user should do now.
    """

    exit_code = EXIT_UNEXPECTED
    title = "Error"

    def __init__(self, problem: str, *, where: str = "", remedy: str = "") -> None:
        super().__init__(problem)
        self.problem = problem
        self.where = where
        self.remedy = remedy

    def __reduce__(self):
        return (_rebuild, (type(self), self.problem, self.where, self.remedy))

    def __str__(self) -> str:
        parts = [self.problem]
        if self.where:
            parts.append(f"[{self.where}]")
        if self.remedy:
            parts.append(self.remedy)
        return " ".join(parts)


def _rebuild(kind: type[MaskwrightError], problem: str, where: str, remedy: str) -> MaskwrightError:
    return kind(problem, where=where, remedy=remedy)


class UserError(MaskwrightError):
    """A mistake in the configuration, the arguments or the input."""

    exit_code = EXIT_USER_MISTAKE
    title = "Please check"


class DamagedError(MaskwrightError):
    """Data or a checkpoint on disk is not what its manifest says it should be."""

    exit_code = EXIT_DAMAGED
    title = "Damaged"


class DivergedError(MaskwrightError):
    """Training cannot go on: losses or gradients stay non-finite."""

    exit_code = EXIT_DIVERGED
    title = "Diverged"


class HangError(MaskwrightError):
    """A phase of the run makes no progress: a rank, its machine or the network is stuck."""

    title = "Stuck"


def mark_origin(error: Exception, rank: int) -> None:
    """Note on which rank an error arose that is raised on others as well."""
    error.__dict__["origin_rank"] = rank


def origin_of(error: BaseException, rank: int) -> int:
    """Find the rank on which an error arose that was raised on `rank`."""
    return error.__dict__.get("origin_rank", rank)


class DivergenceError(Exception):
    """Training has diverged, on all ranks alike: for the loop to act on. `DivergedError` is what ends a run.

    Attributes:
        reason: what was seen, as the end of a sentence.
        onset: the first step that went wrong; a checkpoint of an earlier step is good.
        where: the setting that decided, or the step.
    """

    def __init__(self, reason: str, onset: int, where: str) -> None:
        super().__init__(reason)
        self.reason, self.onset, self.where = reason, onset, where


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ' Did you mean X?' for the closest known name, or an empty string."""
    import difflib

    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


def cannot_write(place: Path, run_dir: Path, error: OSError) -> UserError:
    """Make the error that a user is told when a file or folder of the run cannot be written."""
    return UserError(
        f"Cannot write to the run folder: {place}: {error.strerror or error}.",
        where=f"run.dir={run_dir}",
        remedy="Give a run.dir that is, or can be made, a folder that you may write to.",
    )
