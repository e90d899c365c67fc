"""Files of a run folder that no resume needs: read as far as they can be understood, and never in the way.

A crash of the machine leaves some of them empty, a full disk cut short, a person anything at all. What is not a record
of the expected kind is left out, with a warning that names the file and the line.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from trainer.runtime.files import replace_synced
from trainer.runtime.typed_json import as_type

logger = logging.getLogger(__name__)
T = TypeVar("T")


def read_record(path: Path, kind: type[T]) -> T | None:
    """Read the dataclass that a JSON file holds; None where there is none, or it cannot be understood."""
    try:
        return as_type(kind, json.loads(path.read_bytes()))
    except (OSError, ValueError, RecursionError):
        return None


def read_json_object(path: Path) -> dict[str, Any] | None:
    """Read the object that a JSON file holds; None where there is none, or it cannot be understood."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def read_lines(path: Path, understand: Callable[[Any], T]) -> list[T]:
    """Read the records of a file with one JSON value a line, those left out that cannot be understood.

    Args:
        understand: makes a record of a JSON value, or raises ValueError.
    """
    records, left_out, why = [], [], ""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        logger.warning("%s cannot be read, and is left out: %s", path, error.strerror)
        return []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            records.append(understand(json.loads(line)))
        except (ValueError, RecursionError) as error:
            left_out.append(number)
            why = why or str(error)
    if left_out:
        more = f" and {len(left_out) - 1:,} more" if len(left_out) > 1 else ""
        logger.warning("%s: line %d%s is no record, and is left out: %s", path, left_out[0], more, why[:200])
    return records


def replace_side_file(path: Path, content: bytes) -> None:
    """Write a file durably; a folder in its place is moved beside it, with a warning."""
    move_folder_away(path)
    replace_synced(path, content)


def move_folder_away(path: Path) -> None:
    """Rename a folder that stands where a file of the run belongs."""
    if not path.is_dir():
        return
    number = 1
    while os.path.lexists(target := path.with_name(f"{path.name}.folder-{number}")):
        number += 1
    path.rename(target)
    logger.warning("%s is a folder where the run writes a file; it is now %s", path, target.name)
