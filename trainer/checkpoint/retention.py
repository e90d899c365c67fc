"""What stays in the folder of checkpoints, what is removed from it, and whether one more fits."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from trainer.checkpoint.find import Candidate, candidates, checkpoints_folder, find_candidate_faults, is_best_yet
from trainer.checkpoint.manifest import Records
from trainer.config import CheckpointConfig
from trainer.engine.state_size import checkpoint_bytes
from trainer.errors import cannot_write
from trainer.runtime.files import unique_name

logger = logging.getLogger(__name__)
LEAST_VALID = 2
"""Checkpoints that are never gone below: the newest may turn out to be damaged."""


def expendable(
    found: Sequence[Candidate],
    settings: CheckpointConfig,
    pinned: Collection[Path],
    is_valid: Callable[[Candidate], bool],
) -> list[Path]:
    """Find the checkpoints that the settings do not keep.

    Args:
        found: of a run, newest first.
        pinned: kept whatever the settings say.
        is_valid: whether one counts among the last few that are kept; asked of the newest ones only. Those that do not
            count are no reason to remove another, and are removed like the others once they are older than all of them.
    """
    every = settings.keep_every_steps
    valid, doomed = 0, []
    for candidate in found:
        if valid < max(settings.keep_last, LEAST_VALID):
            valid += is_valid(candidate)
            continue
        kept_for_good = candidate.folder in pinned or (every is not None and candidate.step % every == 0)
        if candidate.manifest is not None and not kept_for_good:
            doomed.append(candidate.folder)
    return doomed


def best_so_far(found: Sequence[Candidate], is_whole: Callable[[Candidate], bool]) -> Path | None:
    """Find the whole checkpoint whose evaluation was the best of those that have one; None where none was.

    Each best one is better than those before it: of the checkpoints whose own evaluation was the best up to then, the
    newest is it. Where the save of a better one has failed, that is an earlier one, and still the best there is.

    Args:
        found: of a run, newest first.
    """
    return next((candidate.folder for candidate in found if is_best_yet(candidate) and is_whole(candidate)), None)


def is_complete(candidate: Candidate) -> bool:
    """Tell whether the manifest can be read and all its files have their sizes: no file is read."""
    return not find_candidate_faults(candidate, read=False)


def is_sound(candidate: Candidate) -> bool:
    """Tell whether a checkpoint is complete, and was saved after a good step.

    One that was saved on request while steps were skipped can be resumed from, but should training diverge, it is none
    to go back to.
    """
    in_trouble = candidate.manifest is not None and candidate.manifest.state.get("skipped_in_a_row", 0) > 0
    return not in_trouble and is_complete(candidate)


def remove(folder: Path) -> None:
    """Remove a checkpoint; renamed first, so that a crash midway does not leave half of one by its name."""
    doomed = folder.with_name(f".tmp-{folder.name}-removed")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(run_dir: Path) -> list[str]:
    """Remove what saves and removals that were cut short have left; returns a line for each.

    Raises:
        OSError: when one cannot be removed.
    """
    lines = []
    for leftover in sorted(checkpoints_folder(run_dir).glob(".tmp-step-*")):
        size = sum(path.stat().st_size for path in leftover.rglob("*") if path.is_file())
        shutil.rmtree(leftover)
        lines.append(f"removed {leftover.name}, {size / 2**20:,.1f} MiB of a checkpoint that was not finished")
    return lines


def prepare_folder(run_dir: Path) -> list[str]:
    """See before a start that checkpoints can be written, and remove leftovers; returns what to tell the user.

    Raises:
        UserError: when no file can be written there.
    """
    checkpoints = checkpoints_folder(run_dir)
    folder = checkpoints if checkpoints.exists() else run_dir
    probe = unique_name(folder / "probe")
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise cannot_write(folder, run_dir, error) from None
    try:
        return remove_leftovers(run_dir)
    except OSError as error:  # the next save tries again, and says so
        return [f"what an unfinished save left cannot be removed: {error}"]


def too_little_space(run_dir: Path, records: Records) -> str:
    """Compare the free space with what a checkpoint takes; empty when it fits.

    That is the size of the newest checkpoint, or, of the first one and where other weights are frozen, what the model
    says.
    """
    frozen = records.model.get("frozen", 0)
    newest = next((found.manifest for found in candidates(run_dir) if found.manifest is not None), None)
    sizes = [newest.bytes] if newest is not None and newest.model.get("frozen", 0) == frozen else []
    free = shutil.disk_usage(run_dir).free
    needed = sizes[0] if sizes else estimated_bytes(records)
    if free >= needed:
        return ""
    source = "the last one took" if sizes else "one should take"
    return f"{free / 2**20:,.0f} MiB are free in {run_dir}, {source} {needed / 2**20:,.0f} MiB"


def estimated_bytes(records: Records) -> int:
    """Estimate the bytes that a checkpoint of this run should take."""
    frozen = records.model.get("frozen", 0)
    trained = records.model["parameters"] - frozen
    matrices = records.model.get("matrices", 0)
    return checkpoint_bytes(trained, records.layout["stage"], records.layout["precision"], frozen, matrices)
