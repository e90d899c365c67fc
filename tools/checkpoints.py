"""`maskwright checkpoint list` and `verify`: what can be resumed, and whether every file is whole."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from trainer.checkpoint.find import Candidate, candidates
from trainer.checkpoint.manifest import find_faults
from trainer.errors import DamagedError, UserError


def list_run(run: str, as_json: bool, console: Console) -> None:
    """Print the checkpoints of a run, newest first, and why one cannot be used (by file sizes, not hashes)."""
    rows = [_row(candidate) for candidate in _candidates(run)]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table("checkpoint", "step", "tokens", "saved", "ranks", "stage", "precision", "size", "state", box=None)
    for row in rows:
        saved = datetime.fromtimestamp(row["saved_at"]).strftime("%Y-%m-%d %H:%M") if row["saved_at"] else ""
        size = f"{row['bytes'] / 2**20:,.1f} MiB"
        layout = row["layout"]
        shape = [str(layout.get(name, "")) for name in ("world_size", "stage", "precision")]
        table.add_row(row["name"], f"{row['step']:,}", f"{row['tokens']:,}", saved, *shape, size, row["state"])
    console.print(table)


def verify_run(run: str, as_json: bool, console: Console) -> None:
    """Read every file of every checkpoint of a run (or of one checkpoint folder).

    Raises:
        DamagedError: naming each damaged file.
    """
    results = {}
    for candidate in _candidates(run):
        faults = [candidate.fault] if candidate.manifest is None else find_faults(candidate.folder, candidate.manifest)
        results[candidate.folder.name] = faults
        if not as_json:
            console.print(f"{candidate.folder.name}: {'; '.join(faults) if faults else 'whole'}", markup=False)
    if as_json:
        print(json.dumps(results, indent=1))
    damaged = [f"{name}: {'; '.join(faults)}" for name, faults in results.items() if faults]
    if damaged:
        raise DamagedError(
            f"{len(damaged)} of {len(results)} checkpoints damaged. {' | '.join(damaged)}",
            where=run,
            remedy="`train --resume auto` uses the newest whole one; a damaged folder can be removed.",
        )


def _candidates(run: str) -> list[Candidate]:
    path = Path(run).expanduser()
    if path.name.startswith("step-") and path.is_dir():
        beside = candidates(path.resolve().parent.parent)
        found = [candidate for candidate in beside if candidate.folder.name == path.name]
    else:
        found = candidates(path)
    if not found:
        raise UserError(
            f"No checkpoints in '{path}'.",
            where=run,
            remedy="Give a run folder (run.dir of the config) that has saved at least once.",
        )
    return found


def _row(candidate: Candidate) -> dict[str, Any]:
    manifest = candidate.manifest
    if manifest is None:
        empty = {"tokens": 0, "bytes": 0, "layout": {}, "saved_at": None}
        return {
            "name": candidate.folder.name,
            "step": candidate.step,
            "state": candidate.fault,
            "valid": False,
            **empty,
        }
    faults = _size_faults(candidate)
    return {
        "name": candidate.folder.name,
        "step": manifest.step,
        "tokens": manifest.state["tokens"],
        "bytes": manifest.bytes,
        "layout": manifest.layout,
        "saved_at": manifest.saved_at,
        "valid": not faults,
        "state": "; ".join(faults) if faults else "valid",
        "manifest": {key: value for key, value in asdict(manifest).items() if key != "files"},
    }


def _size_faults(candidate: Candidate) -> list[str]:
    assert candidate.manifest is not None
    faults = []
    for name, (size, _) in candidate.manifest.files.items():
        path = candidate.folder / name
        if not path.is_file():
            faults.append(f"{name}: missing")
        elif path.stat().st_size != size:
            faults.append(f"{name}: {path.stat().st_size:,} bytes instead of {size:,}")
    return faults
