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
from trainer.checkpoint.manifest import CheckpointManifest, Records, step_folder, write_manifest
from trainer.config import CheckpointConfig
from trainer.distributed import World
from trainer.engine import TrainingEngine
from trainer.files import file_hash, replace_synced, sync_folder
from trainer.state import TrainState

logger = logging.getLogger(__name__)
RECORDED_PACKAGES = ("maskwright", "torch", "deepspeed", "transformers", "tokenizers", "datasets", "numpy")


@dataclass
class Saver:
    """Saves the checkpoints of one run.

    Attributes:
        contents: called on every rank before a save (a collective); what it returns is called on rank 0 with the
            temporary folder and writes what makes a checkpoint self-contained (model config, tokenizer, probe).
        saved_step: the step whose checkpoint is known to be whole: resumed from, or saved last.
    """

    run_dir: Path
    world: World
    engine: TrainingEngine
    settings: CheckpointConfig
    records: Records
    contents: Callable[[], Callable[[Path], None]]
    saved_step: int | None = None

    def save(self, state: TrainState) -> Path | None:
        """Save `state` and the engine; every rank calls it at the same step.

        Returns:
            The checkpoint's folder, or None when a rank could not write: nothing has changed then, and training
            can go on.
        """
        target = step_folder(checkpoints_folder(self.run_dir), state.step)
        if self.saved_step == state.step:
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
        self.saved_step = state.step
        return target

    def _write(self, temporary: Path) -> tuple[dict[str, tuple[int, str]], str]:
        """Write this rank's files; returns them, or why it could not."""
        write_contents = self.contents()
        problem = ""
        if self.world.is_main:
            try:
                self._remove_leftovers()
                temporary.mkdir(parents=True)
                problem = self._too_little_space()
            except OSError as error:
                problem = str(error)
        problem = distributed.from_main(self.world, problem)
        if problem:
            return {}, problem if self.world.is_main else ""
        files: dict[str, tuple[int, str]] = {}
        if self.world.is_main:
            try:
                write_contents(temporary)
                files |= _record(temporary)
            except Exception as error:  # tokenizers and safetensors report a full disk by exceptions of their own
                problem = str(error) or type(error).__name__
        try:
            files |= self.engine.save(temporary)  # holds barriers: every rank calls it, whatever failed before
        except OSError as error:
            problem = problem or str(error)
        return files, problem

    def _too_little_space(self) -> str:
        """Compare the free space with the size of the newest checkpoint; empty when it fits or there is none yet."""
        sizes = [candidate.manifest.bytes for candidate in candidates(self.run_dir) if candidate.manifest is not None]
        free = shutil.disk_usage(self.run_dir).free
        if sizes and free < sizes[0]:
            return f"{free / 2**20:,.0f} MiB are free, the last checkpoint took {sizes[0] / 2**20:,.0f} MiB"
        return ""

    def _commit(self, temporary: Path, target: Path, state: TrainState, files: dict[str, tuple[int, str]]) -> str:
        try:
            manifest = CheckpointManifest(
                state=state.to_dict(),
                layout=self.records.layout,
                identity=self.records.identity,
                data_order=self.records.data_order,
                model=self.records.model,
                files=dict(sorted(files.items())),
                versions={name: importlib.metadata.version(name) for name in RECORDED_PACKAGES},
                saved_at=time.time(),
            )
            write_manifest(temporary, manifest)
            if target.exists():  # damaged, or of a branch of the run that was left
                _remove(target)
            os.replace(temporary, target)
            sync_folder(target.parent)
        except OSError as error:
            return str(error)
        try:
            replace_synced(target.parent / "latest", target.name.encode())
            self._rotate(target)
        except OSError as error:  # the checkpoint is there all the same
            logger.warning("after saving %s: %s", target.name, error)
        return ""

    def _rotate(self, newest: Path) -> None:
        """Remove old checkpoints: all but the last few, and those kept for good."""
        keep_every = self.settings.keep_every_steps
        whole = [candidate for candidate in candidates(self.run_dir) if candidate.manifest is not None]
        for place, candidate in enumerate(whole):
            kept_for_good = keep_every is not None and candidate.step % keep_every == 0
            if place >= self.settings.keep_last and not kept_for_good and candidate.folder != newest:
                _remove(candidate.folder)

    def _remove_leftovers(self) -> None:
        for leftover in checkpoints_folder(self.run_dir).glob(".tmp-step-*"):
            shutil.rmtree(leftover)


def _remove(folder: Path) -> None:
    """Remove a checkpoint; renamed first, so that a crash midway does not leave half of one by its name."""
    doomed = folder.with_name(f".tmp-{folder.name}-removed")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _record(folder: Path) -> dict[str, tuple[int, str]]:
    """Sync and hash all files below a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            continue
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        found[path.relative_to(folder).as_posix()] = (path.stat().st_size, file_hash(path))
    for inner in {path.parent for path in folder.rglob("*")}:
        sync_folder(inner)
    return found
