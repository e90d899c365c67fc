"""metrics.jsonl: one JSON object a line, each step once, over any number of restarts."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from pathlib import Path
from typing import Any

from trainer.runtime import side_files
from trainer.runtime.side_files import replace_side_file

_COUNTERS = ("samples", "tokens", "time")  # beside step
_TAIL_BYTES = 1 << 18


class JsonlWriter:
    """Appends lines to metrics.jsonl; rank 0 only.

    Args:
        resumed_step: lines of later steps come from a run that was lost before its next checkpoint; they are
            dropped, since those steps happen again. None for a fresh start, which keeps none.
        keep_events: keep events of later steps, at the resumed step: after a rollback they do not happen again.
    """

    def __init__(self, path: Path, resumed_step: int | None, keep_events: bool = False) -> None:
        kept = []
        for line in read_metrics(path) if resumed_step is not None else ():
            if line["step"] <= resumed_step:
                kept.append(line)
            elif keep_events and "event" in line:
                kept.append({**line, "step": resumed_step})
        replace_side_file(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = open(path, "ab", buffering=0)
        self._torn = False

    def write(self, values: dict[str, Any]) -> None:
        """Append one line.

        Raises:
            OSError: when the disk is full; what was written of the line is skipped on reading.
        """
        line = ("\n" if self._torn else "") + json.dumps(values, allow_nan=False) + "\n"
        self._torn = True
        if self._file.write(line.encode()) != len(line):
            raise OSError(errno.ENOSPC, "no space left on the device")
        self._torn = False

    def close(self) -> None:
        self._file.close()


def read_last(path: Path, name: str) -> dict[str, Any] | None:
    """Find the last whole line that has a value of that name, at the end of the file only; None without one."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            tail = file.read().decode(errors="replace").splitlines()
    except OSError:
        return None
    for text in reversed(tail):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        with contextlib.suppress(ValueError):
            if name in _metrics_line(line):
                return line
    return None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read all lines that are metrics; others, such as one cut off by a crash, are left out with a warning."""
    return side_files.read_lines(path, _metrics_line)


def _metrics_line(line: Any) -> dict[str, Any]:
    """Raise ValueError for what is no line of metrics: an object with a step, its counters and metrics numbers."""
    if not isinstance(line, dict):
        raise ValueError("it is no object")
    step = line.get("step")
    if type(step) is not int or not 0 <= step < 1 << 63:
        raise ValueError("it has no step")
    for name, value in line.items():
        if name in _COUNTERS or ("/" in name and not name.startswith("event/")):
            _check_number(name, value)
    return line


def _check_number(name: str, value: Any) -> None:
    if value is not None and not (type(value) in (int, float) and abs(value) < math.inf):
        raise ValueError(f"{name[:60]} is no number")
