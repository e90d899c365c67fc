"""Back to the last good checkpoint, when training has diverged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.checkpoint.find import newest_before
from trainer.checkpoint.manifest import CheckpointManifest, write_manifest
from trainer.checkpoint.resume import set_aside_newer
from trainer.errors import MaskwrightError
from trainer.runtime import distributed
from trainer.runtime.distributed import World
from trainer.state import TrainState


def last_good(world: World, run_dir: Path, state: TrainState, onset: int) -> tuple[Path, CheckpointManifest] | None:
    """Find the newest whole checkpoint of an earlier step than `onset`, the same on every rank.

    A checkpoint that was gone back to before, and from which not one step was good, is not tried again: an older one
    is.

    Args:
        state: of the run that has diverged.
    """
    last = state.rollbacks[-1]["step"] if state.rollbacks else None
    return newest_before(world, run_dir, last if last is not None and onset <= last + 1 else onset)


def leave_branch(
    world: World,
    run_dir: Path,
    folder: Path,
    manifest: CheckpointManifest,
    state: TrainState,
    data_order: dict[str, Any],
    rewind: Callable[[], None],
) -> Path:
    """Set later checkpoints and a copy of the metrics aside, and let a resume from `folder` start from `state`.

    A run that is lost before its next save then goes on as it would have: it neither sees the data again nor forgets
    the rollback. A manifest is replaced whole.

    Args:
        data_order: that `state` has come through; it may have changed since the save, for what lay ahead then.
        rewind: takes back what was reported of later steps; called on rank 0.

    Returns:
        The folder of what was set aside, on rank 0; elsewhere the run folder.

    Raises:
        MaskwrightError: on every rank, when rank 0 cannot write.
    """
    moved, error = run_dir, None
    if world.is_main:
        try:
            moved = set_aside_newer(run_dir, manifest.step, always_metrics=True) or run_dir
            write_manifest(folder, replace(manifest, state=state.to_dict(), data_order=data_order))
            rewind()
        except OSError as caught:
            error = _cannot_go_back(run_dir, folder, caught)
    distributed.raise_on_all_ranks(world, error)
    return moved


def _cannot_go_back(run_dir: Path, folder: Path, error: OSError) -> MaskwrightError:
    """Make the error for a rollback that the file system does not allow."""
    return MaskwrightError(
        f"Training diverged, and the run folder cannot be written to go back to {folder.name} ({error.strerror}).",
        where=str(run_dir),
        remedy="Free space or restore access, and start the same command again.",
    )
