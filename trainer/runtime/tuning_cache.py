"""What a start of a run finds out by trying, for every later start: a JSON list of records in the run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainer.runtime.side_files import replace_side_file


def recall(path: Path) -> list[dict[str, Any]]:
    """Read the records, oldest first; nothing when the file cannot be read: it only saves a search."""
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    return [record for record in records if isinstance(record, dict)] if isinstance(records, list) else []


def remember(path: Path, record: dict[str, Any]) -> None:
    """Add a record."""
    replace_side_file(path, (json.dumps([*recall(path), record], indent=1) + "\n").encode())
