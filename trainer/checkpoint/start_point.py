"""Where a start begins, and whether anything is left to do from there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trainer.checkpoint.find import choose_checkpoint
from trainer.checkpoint.manifest import CheckpointManifest, read_checkpoint_manifest
from trainer.checkpoint.resume import is_own
from trainer.checkpoint.run_folder import check_replaceable
from trainer.config import Config
from trainer.runtime import distributed
from trainer.runtime.distributed import World
from trainer.state import TrainState


@dataclass(frozen=True)
class StartPoint:
    """Where a run starts from: a checkpoint, or nothing."""

    checkpoint: Path | None
    manifest: CheckpointManifest | None
    state: TrainState

    @classmethod
    def afresh(cls) -> StartPoint:
        return cls(None, None, TrainState())


def choose_start(world: World, run_dir: Path, resume: str, say: Callable[[str], None]) -> StartPoint:
    """Choose the checkpoint to go on from, the same on all ranks. Arguments and errors as of `choose_checkpoint`.

    Raises:
        UserError: also when the start would replace a file of the user's.
    """
    checkpoint = choose_checkpoint(world, run_dir, resume, say)
    distributed.run_on_all_ranks(
        world, lambda: check_replaceable(run_dir, resume, checkpoint) if world.is_main else None
    )
    if checkpoint is None:
        return StartPoint.afresh()
    manifest = read_checkpoint_manifest(checkpoint)
    state = TrainState(**manifest.state)
    if not is_own(run_dir, checkpoint):
        state.forget_evaluations()  # what was the best there has no checkpoint here
    return StartPoint(checkpoint, manifest, state)


def nothing_left(config: Config, state: TrainState, total_steps: int) -> str:
    """Say why there is nothing to train from a state on; empty when there is."""
    if state.step >= total_steps:
        return f"finished: step {state.step} of {total_steps} is done"
    early = state.early_end(total_steps, config.eval.patience)
    return f"{early} (a larger eval.patience, or null, goes on)" if early else ""
