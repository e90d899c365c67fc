"""Saving: every rank writes, all vote, rank 0 writes the manifest and renames. All of it, or nothing."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trainer import distributed
from trainer.checkpoint.find import candidates, checkpoints_folder
from trainer.checkpoint.manifest import MANIFEST, CheckpointManifest, Records, step_folder, write_manifest
from trainer.config import CheckpointConfig
from trainer.distributed import World
from trainer.engine import TrainingEngine
from trainer.files import file_hash, replace_synced, sync_folder
from trainer.state import TrainState

logger = logging.getLogger(__name__)
RECORDED_PACKAGES = ("maskwright", "torch", "deepspeed", "transformers", "tokenizers", "datasets", "numpy")


@dataclass(frozen=True)
class Saver:
    """Saves the checkpoints of one run.

    Attributes:
        write_contents: called on every rank with the temporary folder; writes what makes a checkpoint
            self-contained (model config, tokenizer, probe).
    """

    run_dir: Path
    world: World
    engine: TrainingEngine
    settings: CheckpointConfig
    records: Records
    write_contents: Callable[[Path], None]

    def save(self, state: TrainState) -> Path | None:
        """Save `state` and the engine; every rank calls it at the same step.

        Returns:
            The checkpoint's folder, or None when a rank could not write: nothing has changed then, and training
            can go on.
        """
        target = step_folder(checkpoints_folder(self.run_dir), state.step)
        if distributed.from_main(self.world, (target / MANIFEST).is_file()):
            return target
        temporary = target.with_name(f".tmp-{target.name}")
        files, error = self._write(temporary)
        outcomes = distributed.gather(self.world, (files, error))
        errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(outcomes) if error]
        if not errors and self.world.is_main:
            written = {name: record for files, _ in outcomes for name, record in files.items()}
            error = self._commit(temporary, target, state, written)
            errors = [f"rank 0: {error}"] if error else []
        errors = distributed.from_main(self.world, errors)
        if errors:
            if self.world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            logger.error("checkpoint at step %d was not saved (%s); training goes on", state.step, "; ".join(errors))
            return None
        return target

    def _write(self, temporary: Path) -> tuple[dict[str, tuple[int, str]], str]:
        """Write this rank's files; returns them, or why it could not."""
        problem = ""
        if self.world.is_main:
            try:
                self._remove_leftovers()
                temporary.mkdir(parents=True)
            except OSError as error:
                problem = str(error)
        if distributed.from_main(self.world, problem):
            return {}, problem
        files: dict[str, tuple[int, str]] = {}
        for write in (self._write_contents, self.engine.save):  # both hold collectives: call each, whatever fails
            try:
                files |= write(temporary)
            except OSError as error:
                problem = problem or str(error)
        return files, problem

    def _write_contents(self, temporary: Path) -> dict[str, tuple[int, str]]:
        self.write_contents(temporary)
        paths = [path for path in temporary.rglob("*") if path.is_file()] if self.world.is_main else []
        return {path.relative_to(temporary).as_posix(): (path.stat().st_size, file_hash(path)) for path in paths}

    def _commit(self, temporary: Path, target: Path, state: TrainState, files: dict[str, tuple[int, str]]) -> str:
        try:
            manifest = CheckpointManifest(
                state=state.to_dict(),
                layout=self.records.layout,
                identity=self.records.identity,
                model=self.records.model,
                files=dict(sorted(files.items())),
                versions={name: importlib.metadata.version(name) for name in RECORDED_PACKAGES},
                saved_at=time.time(),
            )
            write_manifest(temporary, manifest)
            if target.exists():  # a damaged one of the same step
                shutil.rmtree(target)
            os.replace(temporary, target)
            sync_folder(target.parent)
            replace_synced(target.parent / "latest", target.name.encode())
        except OSError as error:
            return str(error)
        self._rotate(target)
        return ""

    def _rotate(self, newest: Path) -> None:
        """Remove old checkpoints: all but the last few, and those kept for good."""
        keep_every = self.settings.keep_every_steps
        whole = [candidate for candidate in candidates(self.run_dir) if candidate.manifest is not None]
        for place, candidate in enumerate(whole):
            kept_for_good = keep_every is not None and candidate.step % keep_every == 0
            if place >= self.settings.keep_last and not kept_for_good and candidate.folder != newest:
                # Renamed first: a crash in the middle of removing must not leave half a checkpoint by that name.
                doomed = candidate.folder.with_name(f".tmp-{candidate.folder.name}")
                shutil.rmtree(doomed, ignore_errors=True)
                os.replace(candidate.folder, doomed)
                shutil.rmtree(doomed, ignore_errors=True)

    def _remove_leftovers(self) -> None:
        for leftover in checkpoints_folder(self.run_dir).glob(".tmp-step-*"):
            shutil.rmtree(leftover)
