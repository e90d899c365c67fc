"""`maskwright checkpoint list` and `verify`: what can be resumed, and whether every file is whole."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import datetime
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

from tools.prepare.progress import ReadProgress
from tools.prepare.summary import human_bytes
from trainer.checkpoint.find import Candidate, candidates, find_best, find_candidate_faults
from trainer.errors import DamagedError, UserError
from trainer.runtime.paths import real_path, user_path
from trainer.runtime.plain_text import listed

_SHAPE = ("world_size", "stage", "precision")


def list_run(run: str, as_json: bool, console: Console) -> None:
    """Print the checkpoints of a run, newest first, and why one cannot be used (by file sizes, not hashes)."""
    found = _candidates(run)
    best = find_best(found)
    rows = [_row(candidate, is_best=candidate is best) for candidate in found]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table("checkpoint", "step", "tokens", "saved", "ranks", "stage", "precision", "size", "state", box=None)
    for row in rows:
        saved = datetime.fromtimestamp(row["saved_at"]).strftime("%Y-%m-%d %H:%M") if row["saved_at"] else ""
        size = human_bytes(row["bytes"]) if row["bytes"] else ""
        tokens = f"{row['tokens']:,}" if row["tokens"] is not None else ""
        shape = ["" if row[name] is None else str(row[name]) for name in _SHAPE]
        state = f"{row['state']}{', best' if row['best'] else ''}"
        table.add_row(row["name"], f"{row['step']:,}", tokens, saved, *shape, size, state)
    console.print(table)
    console.print("By manifests and file sizes; `maskwright checkpoint verify` reads every byte.")


def verify_run(run: str, as_json: bool, console: Console) -> None:
    """Read every file of every checkpoint of a run (or of one checkpoint folder).

    Raises:
        DamagedError: naming each damaged file.
    """
    found = _candidates(run)
    total = sum(candidate.manifest.bytes for candidate in found if candidate.manifest is not None)
    results: dict[str, list[str]] = {}
    before = 0
    with ReadProgress(console, "Verifying", total) as progress:
        for candidate in found:
            faults = find_candidate_faults(candidate, on_bytes=partial(_show, progress, before))
            before += candidate.manifest.bytes if candidate.manifest is not None else 0
            if faults and not candidate.folder.exists():
                continue  # the run goes on, and has removed it by now
            results[candidate.folder.name] = faults
            if not as_json:
                console.print(f"{candidate.folder.name}: {'; '.join(faults) if faults else 'whole'}", markup=False)
    if as_json:
        print(json.dumps(results, indent=1))
    damaged = [f"{name}: {listed(faults, separator='; ')}" for name, faults in results.items() if faults]
    if damaged:
        raise DamagedError(
            f"{len(damaged)} of {len(results)} checkpoints damaged. {' | '.join(damaged)}",
            where=run,
            remedy="`train --resume auto` uses the newest whole one; a damaged folder can be removed.",
        )


def _show(progress: ReadProgress, before: int, done: int) -> None:
    progress.update(before + done)


def _candidates(run: str) -> list[Candidate]:
    path = user_path(run)
    if real_path(path).name.startswith("step-") and path.is_dir():
        beside = candidates(real_path(path).parent.parent)
        found = [candidate for candidate in beside if candidate.folder.name == real_path(path).name]
    else:
        found = candidates(path)
    if not found:
        raise UserError(
            f"No checkpoints in '{path}'.",
            where=run,
            remedy="Give a run folder (run.dir of the config) that has saved at least once.",
        )
    return found


def _row(candidate: Candidate, is_best: bool) -> dict[str, Any]:
    """Collect what is known of a checkpoint; values are None where its manifest cannot be read."""
    manifest, faults = candidate.manifest, find_candidate_faults(candidate, read=False)
    layout = manifest.layout if manifest else {}
    return {
        "name": candidate.folder.name,
        "step": candidate.step,
        "tokens": manifest.state["tokens"] if manifest else None,
        "saved_at": manifest.saved_at if manifest else None,
        "bytes": manifest.bytes if manifest else None,
        **{name: layout.get(name) for name in _SHAPE},
        "best": is_best,
        "valid": not faults,
        "state": listed(faults, separator="; ") if faults else "valid",
        "manifest": {key: value for key, value in asdict(manifest).items() if key != "files"} if manifest else None,
    }
