"""One rank in this process: run its work, and tell what went wrong so that the first cause can be shown.

Under our own launcher (MASKWRIGHT_ERROR_FILE is set) a rank prints nothing: it writes a report, and the launcher
shows the one that came first. Under torchrun or srun nobody collects reports: rank 0 prints the card and the
others one line each, and torchrun gets its own error file as well.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from launcher.console import ErrorCard, exit_code, print_card
from trainer.errors import MaskwrightError, origin_of
from trainer.runtime.plain_text import printable

ERROR_FILE_VARIABLE = "MASKWRIGHT_ERROR_FILE"
INTERRUPTED = "KeyboardInterrupt"
_LOG_TAIL_BYTES = 1 << 16


@dataclass(frozen=True)
class ErrorReport:
    """Why a rank ended early."""

    timestamp: float
    """When the error reached the top of the rank: seconds since the epoch."""
    rank: int
    """Where the error arose; the rank that reports may be another one, on which it was raised as well."""
    is_own: bool
    """Whether it arose on the rank that reports."""
    kind: str
    """Class of the exception."""
    exit_code: int
    title: str
    problem: str
    where: str
    remedy: str
    traceback: str
    """Empty for an expected error."""
    log: str
    """The rank's log file, if it has one."""

    @property
    def card(self) -> ErrorCard:
        return ErrorCard(self.title, self.problem, self.where, self.remedy)

    @property
    def is_interrupt(self) -> bool:
        return self.kind == INTERRUPTED

    def write(self, path: Path) -> None:
        from trainer.runtime.files import replace_synced

        replace_synced(path, json.dumps(asdict(self)).encode())

    @classmethod
    def read(cls, path: Path) -> ErrorReport | None:
        """Read the report; None where the rank wrote none."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None


def find_log(run_dir: Path | None, rank: int) -> str:
    """Find the log file of a rank; empty where there is none (a dry run, or an error before it was made)."""
    from trainer.runtime.logs import log_path

    path = log_path(run_dir, rank) if run_dir else None
    return str(path) if path and path.exists() else ""


def ended_file(error_file: Path) -> Path:
    """Name the file that a rank makes beside that of its errors when its work has ended well.

    An exit code alone proves nothing: whatever else Python runs in the process, such as a .pth file or a
    sitecustomize, can end it with 0.
    """
    return error_file.with_suffix(".ended")


def describe_rank(rank: int, log: str) -> str:
    return f"rank {rank}; its log: {log}" if log else f"rank {rank}"


def run_rank(work: Callable[[], int], run_dir: Path | None) -> int:
    """Do this rank's work and return its exit code; whatever escapes is reported, never raised.

    RANK must be set. `run_dir` is where the rank's log lies; None when it leaves none.
    """
    try:
        code = work()
        if os.environ.get(ERROR_FILE_VARIABLE):
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # from here on it could only hide that the work is done
            ended_file(Path(os.environ[ERROR_FILE_VARIABLE])).touch()
        return code
    except SystemExit:
        raise
    except BaseException as error:
        return _report(error, run_dir)


def report_and_end(error: BaseException, run_dir: Path | None) -> NoReturn:
    """Report an error and end the process from any thread, whatever the others are stuck in."""
    os._exit(_report(error, run_dir))


def _report(error: BaseException, run_dir: Path | None) -> int:
    """Tell whoever collects reports, or print; returns the exit code."""
    report = _describe(error, run_dir)
    report_file = os.environ.get(ERROR_FILE_VARIABLE)
    if report_file:
        report.write(Path(report_file))
    else:
        _tell_torchrun(error)
        _print_own(report)
    return report.exit_code


def print_report(report: ErrorReport) -> None:
    """Print the traceback of an unexpected error, and the card."""
    if report.is_interrupt:
        print("Interrupted.", file=sys.stderr)
        return
    if report.traceback:
        print(printable(report.traceback), file=sys.stderr)
    print_card(report.card)


def _describe(error: BaseException, run_dir: Path | None) -> ErrorReport:
    own_rank = int(os.environ["RANK"])
    rank = origin_of(error, own_rank)
    log = find_log(run_dir, rank)
    expected = isinstance(error, MaskwrightError)
    card = ErrorCard.of(error) if expected else _unexpected_card(error, rank, log)
    return ErrorReport(
        timestamp=time.time(),
        rank=rank,
        is_own=rank == own_rank,
        kind=type(error).__name__,
        exit_code=exit_code(error),
        title=card.title,
        problem=card.problem,
        where=card.where,
        remedy=card.remedy,
        traceback="" if expected else "".join(traceback.format_exception(error)),
        log=log,
    )


def _unexpected_card(error: BaseException, rank: int, log: str) -> ErrorCard:
    last_lines = "".join(traceback.format_exception_only(error)).strip().splitlines()
    return ErrorCard(
        title="Unexpected error",
        problem=last_lines[0],
        where=describe_rank(rank, log),
        remedy="The traceback shows where it was raised; if that is in maskwright, it is a bug worth reporting.",
    )


def _tell_torchrun(error: BaseException) -> None:
    """Write torchrun's error file, so that its summary shows this traceback and not only an exit code."""
    if os.environ.get("TORCHELASTIC_ERROR_FILE"):
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def _print_own(report: ErrorReport) -> None:
    """Print the report: rank 0 in full, others in one line, with a traceback only if it would be lost otherwise."""
    if os.environ["RANK"] == "0":
        print_report(report)
    elif report.is_own and not report.is_interrupt:  # else rank 0 has it, too
        line = f"[rank {report.rank}] {report.problem}"
        if not report.traceback:
            line += f" {report.remedy}"
        elif _is_in_log(report):
            line += f" The traceback is in {report.log}"
        else:
            line += f"\n{report.traceback}"
        print(printable(line), file=sys.stderr)


def _is_in_log(report: ErrorReport) -> bool:
    """Tell whether the log has it: training logs what stops it, once it has a log; an earlier error is only here."""
    if not report.log:
        return False
    with open(report.log, "rb") as file:
        file.seek(max(0, os.path.getsize(report.log) - _LOG_TAIL_BYTES))
        return report.problem in file.read().decode(errors="replace")
