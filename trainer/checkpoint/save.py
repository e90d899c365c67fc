"""Saving: every rank writes, all vote, rank 0 writes the manifest and renames. All of it, or nothing."""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trainer.checkpoint.find import Candidate, candidates, checkpoints_folder
from trainer.checkpoint.manifest import (
    FROZEN,
    MODEL_FOLDER,
    PROBE,
    RUN_CONFIG,
    CheckpointManifest,
    Records,
    read_checkpoint_manifest,
    step_folder,
    write_manifest,
)
from trainer.checkpoint.retention import (
    best_so_far,
    expendable,
    is_complete,
    is_sound,
    remove,
    remove_leftovers,
    too_little_space,
)
from trainer.config import CheckpointConfig
from trainer.engine.engine import TrainingEngine
from trainer.engine.snapshot import Snapshot
from trainer.errors import DivergenceError, MaskwrightError, UserError
from trainer.runtime import distributed
from trainer.runtime.distributed import World
from trainer.runtime.files import file_hash, replace_synced, sync_folder
from trainer.runtime.paths import real_path
from trainer.runtime.versions import installed_version
from trainer.state import TrainState

logger = logging.getLogger(__name__)
RECORDED_PACKAGES = ("maskwright", "torch", "deepspeed", "transformers", "tokenizers", "datasets", "numpy")


Files = dict[str, tuple[int, str]]
"""name → (bytes, xxh3_128)"""


@dataclass
class Save:
    """One rank's part of a save that is under way.

    Attributes:
        target: the folder's name when it is whole.
        folder: where it is written.
        write_contents: on rank 0: writes what is not DeepSpeed's into a folder.
        problem: why this rank could not write; empty when it could.
    """

    target: Path
    folder: Path
    state: dict[str, Any]
    snapshot: Snapshot | None = None
    write_contents: Callable[[Path], None] | None = None
    problem: str = ""
    files: Files = field(default_factory=dict)
    thread: threading.Thread | None = None

    @property
    def step(self) -> int:
        return self.state["step"]

    @property
    def is_written(self) -> bool:
        return self.thread is None or not self.thread.is_alive()

    def start_writing(self) -> None:
        # A daemon: who ends in order waits for it, and who is told to stop at once does not.
        self.thread = threading.Thread(target=self._write, name=f"save-{self.step}", daemon=True)
        self.thread.start()

    def wait(self) -> None:
        """Write, or wait for the thread that does."""
        if self.thread is None:
            self._write()
        else:
            self.thread.join()

    def _write(self) -> None:
        try:
            if self.write_contents is not None:
                self.write_contents(self.folder)
                self.files |= _record(self.folder)
            if self.snapshot is not None:
                self.files |= self.snapshot.write()
        except Exception as error:  # tokenizers and safetensors report a full disk by exceptions of their own
            self.problem = str(error) or type(error).__name__
            self.snapshot = None  # and the memory that it holds


@dataclass
class Saver:
    """Saves the checkpoints of one run.

    Attributes:
        contents: called on every rank before a save (a collective); what it returns is called on rank 0 with the
            temporary folder and writes what makes a checkpoint self-contained (model config, tokenizer, probe).
        saved_step: the step whose checkpoint is known to be whole: resumed from, or saved last.
        resumed_from: the run's own checkpoint that this start goes on from; never removed while it runs.
        lock_lost: asked on every rank before a save: why this job may no longer write in the run folder.
        saved: what this start has saved; rank 0 only.
    """

    run_dir: Path
    world: World
    engine: TrainingEngine
    settings: CheckpointConfig
    records: Records
    contents: Callable[[], Callable[[Path], None]]
    saved_step: int | None = field(init=False, default=None)
    resumed_from: Path | None = field(init=False, default=None)
    lock_lost: Callable[[], UserError | None] = lambda: None
    saved: set[Path] = field(default_factory=set)
    first_step: int = field(init=False, default=0)
    _unfinished: Save | None = field(init=False, default=None)

    def resumed(self, folder: Path, step: int) -> None:
        """Note that training goes on from the checkpoint of this run that was saved at `step`."""
        self.saved_step, self.first_step = step, step
        self.resumed_from = checkpoints_folder(self.run_dir) / real_path(folder).name

    def save(self, state: TrainState) -> Path | None:
        """Save `state` and the engine; every rank calls it at the same step, with nothing left to finish.

        Returns:
            The checkpoint's folder, or None when a rank could not write: nothing has changed then, and training
            can go on.

        Raises:
            DivergenceError: on every rank, when weights or optimizer state of one are not finite; nothing has changed.
            UserError: on every rank, when another job has taken the run folder.
        """
        if self.saved_step == state.step:
            return self._target(state)
        self._unfinished = self._begin(state, detached=False)
        return self.finish()

    def begin(self, state: TrainState) -> None:
        """Save as `save` does, but let a thread write the files while training goes on; `finish` ends it.

        Raises:
            DivergenceError, UserError: as `save`.
        """
        if self.saved_step != state.step:
            self._unfinished = self._begin(state, detached=True)
            self._unfinished.start_writing()

    @property
    def is_written(self) -> bool:
        """Whether this rank has written its files of a save that is to be finished."""
        return self._unfinished is not None and self._unfinished.is_written

    def finish(self) -> Path | None:
        """Commit the save that was begun, when all ranks have written it; every rank calls it.

        Returns:
            The checkpoint's folder; None when a rank could not write, or there is nothing to finish.

        Raises:
            UserError: on every rank, when another job has taken the run folder.
        """
        if self._unfinished is None:
            return None
        save, self._unfinished = self._unfinished, None
        save.wait()
        self.check_lock()
        outcomes = distributed.all_gather(self.world, (save.files, save.problem))
        errors = [f"rank {rank}: {problem}" for rank, (_, problem) in enumerate(outcomes) if problem]
        if not errors and self.world.is_main:
            written = {name: record for files, _ in outcomes for name, record in files.items()}
            problem = self._commit(save, written)
            errors = [f"rank 0: {problem}"] if problem else []
        errors = distributed.broadcast_from_main(self.world, errors)
        if errors:
            if self.world.is_main:
                shutil.rmtree(save.folder, ignore_errors=True)
            logger.error("checkpoint at step %d was not saved (%s); training goes on", save.step, "; ".join(errors))
            return None
        self.saved_step = save.step
        return save.target

    def amend(self, state: TrainState) -> None:
        """Write `state` into the checkpoint of its step, if there is one; every rank calls it.

        The evaluation of a step is judged before its save. One that a stop had cut short is judged after the resume,
        and only the manifest has to change: a run that is lost then neither forgets it nor does it again.

        Raises:
            UserError: on every rank, when another job has taken the run folder.
        """
        if self.saved_step != state.step:
            return
        self.check_lock()
        if not self.world.is_main:
            return
        folder = self._target(state)
        try:
            manifest = read_checkpoint_manifest(folder)
            if manifest.state != state.to_dict():
                write_manifest(folder, replace(manifest, state=state.to_dict()))
        except (MaskwrightError, OSError) as error:  # the checkpoint is whole all the same
            logger.warning("%s does not record its evaluation: %s", folder.name, error)

    def check_lock(self) -> None:
        """See that the run folder is still this job's; every rank calls it.

        Raises:
            UserError: on every rank, when another job has taken it.
        """
        distributed.raise_on_all_ranks(self.world, self.lock_lost())

    def _target(self, state: TrainState) -> Path:
        return step_folder(checkpoints_folder(self.run_dir), state.step)

    def _begin(self, state: TrainState, detached: bool) -> Save:
        assert self._unfinished is None, "one save at a time"
        self.check_lock()
        if distributed.all_reduce_sum(self.world, [not self.engine.is_finite()])[0]:
            raise DivergenceError(
                f"weights or optimizer state are not finite at step {state.step}, so they are not saved",
                onset=state.step,
                where=f"step {state.step}",
            )
        target = self._target(state)
        folder = target.with_name(f".tmp-{target.name}")
        write_contents = self.contents()
        problem = ""
        if self.world.is_main:
            try:
                remove_leftovers(self.run_dir)
                folder.mkdir(parents=True)
                problem = too_little_space(self.run_dir, self.records)
            except OSError as error:
                problem = str(error)
        problem = distributed.broadcast_from_main(self.world, problem)
        if problem:
            return Save(target, folder, state.to_dict(), problem=problem if self.world.is_main else "")
        snapshot = self.engine.capture(folder, detached)
        return Save(target, folder, state.to_dict(), snapshot, write_contents if self.world.is_main else None)

    def _commit(self, save: Save, files: Files) -> str:
        target = save.target
        try:
            manifest = CheckpointManifest(
                state=save.state,
                layout=self.records.layout,
                identity=self.records.identity,
                data_order=self.records.data_order,
                model=self.records.model,
                files=dict(sorted(files.items())),
                versions={name: installed_version(name) or "not installed" for name in RECORDED_PACKAGES},
                saved_at=time.time(),
            )
            write_manifest(save.folder, manifest)
            if target.exists():  # damaged, or of a branch of the run that was left
                remove(target)
            os.replace(save.folder, target)
            sync_folder(target.parent)
        except Exception as error:  # whatever it is: the other ranks wait to hear of it
            return str(error) or type(error).__name__
        self.saved.add(target)
        try:
            replace_synced(target.parent / "latest", target.name.encode())
            self._rotate(target)
        except OSError as error:  # the checkpoint is there all the same
            logger.warning("after saving %s: %s", target.name, error)
        return ""

    def _rotate(self, newest: Path) -> None:
        """Remove what the settings do not keep; never the newest, nor what this start was resumed from."""
        found = candidates(self.run_dir)
        # One that was saved while steps were skipped may be left by a rollback, and then it is the one before.
        best = (
            [best_so_far(found, test) for test in (self._is_whole, self._is_valid)] if self.settings.keep_best else []
        )
        pinned = {newest, *filter(None, (self.resumed_from, *best))}
        for folder in expendable(found, self.settings, pinned, self._is_valid):
            remove(folder)

    def _is_valid(self, candidate: Candidate) -> bool:
        return self._is_whole(candidate) and is_sound(candidate)

    def _is_whole(self, candidate: Candidate) -> bool:
        """Tell whether one is complete, and none that this start stepped over: those lie after the one that it took."""
        known = candidate.folder in self.saved or candidate.step <= self.first_step
        return known and is_complete(candidate)


def not_saved(step: int, run_dir: Path) -> MaskwrightError:
    """Make the error for a save that nothing follows."""
    return MaskwrightError(
        f"The checkpoint at step {step} could not be saved, and training ends here.",
        where=str(run_dir),
        remedy="Free space or restore access, and start the same command again: it resumes from the last one.",
    )


def _record(folder: Path) -> Files:
    """Sync and hash what rank 0 wrote besides DeepSpeed's files, which other ranks may be writing now."""
    found = {}
    for path in (folder / RUN_CONFIG, folder / PROBE, folder / FROZEN, *sorted((folder / MODEL_FOLDER).rglob("*"))):
        if not path.is_file():
            continue
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        found[path.relative_to(folder).as_posix()] = (path.stat().st_size, file_hash(path))
    sync_folder(folder / MODEL_FOLDER)
    return found
