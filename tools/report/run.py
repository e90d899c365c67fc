"""`maskwright report`: from run folders to a file."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from trainer.errors import UserError
from trainer.runtime.files import replace_synced, unique_name
from trainer.runtime.paths import check_writable, real_path, user_path

REPORT = "report.html"
MARKER = '<meta name="generator" content="maskwright report">'
"""By which a page of ours is known."""
_OPTION = "--output"
_HEAD_BYTES = 4096


def write_report(runs: list[str], output: str | None, console: Console) -> Path:
    """Write the page; returns its path.

    Args:
        output: default `report.html`, in the run's folder or, of several runs, in the current one.

    Raises:
        UserError: for a folder without a run, and a place where the page cannot be written or a file of the user's is.
    """
    from tools.report.gather import gather

    records = gather(runs)
    path = _place(runs, output)
    from tools.report.page import render  # matplotlib takes a second to import

    page = render(records, MARKER).encode("utf-8", errors="backslashreplace")
    try:
        replace_synced(path, page, unique_name(path))
    except OSError as error:
        problem, remedy = f"Cannot write '{path}': {error.strerror}.", f"Make room, or give another {_OPTION}."
        raise UserError(problem, where=f"{_OPTION} {path}", remedy=remedy) from None
    for record in records:
        for note in record.notes:
            console.print(f"{record.name}: {note}" if len(records) > 1 else note, markup=False, highlight=False)
    console.print(f"wrote {path} ({len(page):,} bytes)", markup=False, highlight=False, soft_wrap=True)
    return path


def _place(runs: list[str], output: str | None) -> Path:
    """Find where the page is to be; see `write_report`."""
    given = output if output is not None else str(user_path(runs[0]) / REPORT) if len(runs) == 1 else REPORT
    path = real_path(user_path(given, _OPTION))
    where, another = f"{_OPTION} {given}", f"Give another {_OPTION}"
    if path.is_dir():
        raise UserError(f"'{path}' is a folder.", where=where, remedy=f"Give a file, such as {given}/{REPORT}.")
    if not path.parent.is_dir():
        raise UserError(f"There is no folder '{path.parent}'.", where=where, remedy=f"Make it, or: {another}.")
    if path.exists() and not _is_ours(path):
        problem = f"'{path}' is there already, and is no report of maskwright's."
        raise UserError(problem, where=where, remedy=f"{another}, or move the file away.")
    check_writable(path.parent, given, _OPTION)
    return path


def _is_ours(path: Path) -> bool:
    """Tell whether a file is a report, which the next one replaces."""
    try:
        with path.open("rb") as file:
            return MARKER.encode() in file.read(_HEAD_BYTES)
    except OSError:
        return False
