"""Which checkpoint to resume from: the newest whole one, the same on every rank."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trainer import distributed
from trainer.checkpoint.manifest import CheckpointManifest, find_faults, read_manifest
from trainer.distributed import World
from trainer.errors import DamagedError, UserError

logger = logging.getLogger(__name__)
_STEP_FOLDER = re.compile(r"step-(\d{8,})$")


@dataclass(frozen=True)
class Candidate:
    """A folder that should be a checkpoint; `fault` says why its manifest cannot be used."""

    folder: Path
    step: int
    manifest: CheckpointManifest | None
    fault: str = ""


def checkpoints_folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def candidates(run_dir: Path) -> list[Candidate]:
    """All step folders of a run, newest first. `latest` plays no part."""
    found = []
    folder = checkpoints_folder(run_dir)
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _STEP_FOLDER.match(path.name)
        if match and path.is_dir():
            found.append(_candidate(path, int(match.group(1))))
    return sorted(found, key=lambda candidate: -candidate.step)


def _candidate(path: Path, step: int) -> Candidate:
    try:
        return Candidate(path, step, read_manifest(path))
    except DamagedError as error:
        return Candidate(path, step, None, error.problem)


def locate(source: str | Path) -> tuple[Path, CheckpointManifest]:
    """The checkpoint that `source` means: a checkpoint folder itself, or the newest whole one of a run folder.

    Raises:
        UserError: when there is none.
        DamagedError: when there are some, but none is whole.
    """
    path = Path(source).expanduser()
    if _STEP_FOLDER.match(path.resolve().name):
        if not path.is_dir():
            raise UserError(f"No checkpoint at '{path}'.", where=str(path), remedy=_names_beside(path))
        manifest = read_manifest(path)
        if faults := find_faults(path, manifest):
            raise _damaged(path, faults)
        return path, manifest
    found = candidates(path)
    if not found:
        raise UserError(
            f"'{path}' is neither a checkpoint nor a run folder with one.",
            where=str(path),
            remedy="Give the run.dir of a run that has saved, or one of its checkpoints/step-… folders.",
        )
    for candidate, manifest, faults in _checked(found):
        if not faults:
            return candidate.folder, manifest
        logger.warning("checkpoint %s is damaged (%s); trying an older one", candidate.folder.name, "; ".join(faults))
    raise _none_whole(found)


def choose(world: World, run_dir: Path, resume: str) -> Path | None:
    """Decide what to resume from. Rank 0 lists, every rank checks its share of the files, all agree.

    Args:
        resume: auto (newest whole one, or a fresh start when there is none), must (newest whole one),
            never (fresh start), or the path of a checkpoint.

    Raises:
        UserError: when `must` or a path finds none.
        DamagedError: when there are checkpoints but none is whole: never a silent fresh start.
    """
    if resume == "never":
        return None
    if resume not in ("auto", "must"):
        folder, error = None, None
        if world.is_main:
            try:
                folder = locate(resume)[0]
            except Exception as caught:
                error = caught
        distributed.raise_together(world, error)
        return distributed.from_main(world, folder)
    found, error = [], None
    if world.is_main:
        try:
            found = candidates(run_dir)
        except OSError as caught:
            error = caught
    distributed.raise_together(world, error)
    found = distributed.from_main(world, found)
    for candidate in found:
        faults = _faults_of(world, candidate)
        if not faults:
            return candidate.folder
        logger.warning(
            "checkpoint %s cannot be used: %s; trying an older one", candidate.folder.name, "; ".join(faults)
        )
    if found:
        raise _none_whole(found)
    if resume == "must":
        raise UserError(
            f"--resume must, but '{run_dir}' has no checkpoint.",
            where=f"run.dir={run_dir}",
            remedy="Correct run.dir, or start with --resume auto.",
        )
    return None


def _faults_of(world: World, candidate: Candidate) -> list[str]:
    if candidate.manifest is None:
        return [candidate.fault]
    names = list(candidate.manifest.files)[world.rank :: world.size]
    shares = distributed.gather(world, find_faults(candidate.folder, candidate.manifest, names))
    return [fault for share in shares for fault in share]


def _checked(found: list[Candidate]) -> Iterator[tuple[Candidate, CheckpointManifest, list[str]]]:
    for candidate in found:
        if candidate.manifest is None:
            logger.warning("%s", candidate.fault)
        else:
            yield candidate, candidate.manifest, find_faults(candidate.folder, candidate.manifest)


def _damaged(folder: Path, faults: list[str]) -> DamagedError:
    return DamagedError(
        f"Checkpoint {folder.name} is damaged: {'; '.join(faults)}.",
        where=str(folder),
        remedy="Use another one: `maskwright checkpoint list RUN` shows them.",
    )


def _none_whole(found: list[Candidate]) -> DamagedError:
    return DamagedError(
        f"None of the {len(found)} checkpoints is whole.",
        where=str(found[0].folder.parent),
        remedy="`maskwright checkpoint verify RUN` names the damaged files. To start over, use --resume never.",
    )


def _names_beside(path: Path) -> str:
    names = sorted(other.name for other in path.parent.glob("step-*")) if path.parent.is_dir() else []
    return f"There are: {', '.join(names)}." if names else "Correct the path."
