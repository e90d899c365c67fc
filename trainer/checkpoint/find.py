"""Which checkpoint to resume from: the newest whole one, the same on every rank."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.checkpoint.manifest import CheckpointManifest, find_faults, share_files, try_manifest
from trainer.errors import DamagedError, MaskwrightError, UserError
from trainer.runtime import distributed
from trainer.runtime.distributed import World
from trainer.runtime.paths import real_path, user_path
from trainer.runtime.plain_text import listed

logger = logging.getLogger(__name__)
_STEP_FOLDER = re.compile(r"step-(\d{8,})$")
_LISTED_FAULTS = 4
_TELL_SECONDS = 10.0


@dataclass(frozen=True)
class Candidate:
    """A folder that should be a checkpoint; `fault` says what is wrong with its manifest."""

    folder: Path
    step: int
    manifest: CheckpointManifest | None
    fault: str = ""


def checkpoints_folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def candidates(run_dir: Path) -> list[Candidate]:
    """List all step folders of a run, newest first. `latest` plays no part."""
    found = []
    folder = checkpoints_folder(run_dir)
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _STEP_FOLDER.match(path.name)
        if match and path.is_dir():
            found.append(_candidate(path, int(match.group(1))))
    return sorted(found, key=lambda candidate: -candidate.step)


def _candidate(path: Path, step: int) -> Candidate:
    return Candidate(path, step, *try_manifest(path))


def locate(source: str | Path) -> tuple[Path, CheckpointManifest]:
    """Find the checkpoint that `source` means: a checkpoint folder itself, or the newest whole one of a run folder.

    Raises:
        UserError: when there is none.
        DamagedError: when there are some, but none is whole.
    """
    return _newest_whole(_meant_by(source), find_candidate_faults)


def is_best_yet(candidate: Candidate) -> bool:
    """Tell whether the evaluation of its own step was better than all before."""
    return candidate.manifest is not None and candidate.manifest.state.get("best_step") == candidate.step


def find_best(found: Sequence[Candidate]) -> Candidate | None:
    """Find the checkpoint of the best evaluation that the newest one knows of; None where there is none of that step.

    Args:
        found: of a run, newest first.
    """
    recorded = _recorded_best(found)
    return next((candidate for candidate in found if candidate.step == recorded and is_best_yet(candidate)), None)


def _recorded_best(found: Sequence[Candidate]) -> int | None:
    manifest = next((candidate.manifest for candidate in found if candidate.manifest is not None), None)
    return manifest.state.get("best_step") if manifest is not None else None


def candidates_of_run(run: str | Path, option: str, purpose: str) -> list[Candidate]:
    """List all step folders of a run, newest first, for an option that is about a run as a whole.

    Raises:
        UserError: when there are none, or a checkpoint was given.
    """
    found = _meant_by(run)
    if found[0].folder == user_path(run):
        raise UserError(
            f"'{run}' is a checkpoint, and {option} {purpose}.",
            where=f"{option} {run}",
            remedy=f"Give the run folder, or leave {option} out.",
        )
    return found


def locate_best(run: str | Path) -> tuple[Path, CheckpointManifest]:
    """Find the checkpoint of a run's best evaluation.

    Raises:
        UserError: when there is none, or a checkpoint was given.
        DamagedError: when it is not whole; another one is not the best.
    """
    found = candidates_of_run(run, "--best", "asks for that of a run's best evaluation")
    best = find_best(found)
    if best is None:
        raise _no_best(run, found)
    return _newest_whole([best], find_candidate_faults)


def _no_best(run: str | Path, found: Sequence[Candidate]) -> UserError:
    step = _recorded_best(found)
    earlier = next((candidate.folder for candidate in found if is_best_yet(candidate)), None)
    if step is None:
        problem = f"'{run}' has no best checkpoint: no evaluation is recorded in its checkpoints."
        remedy = "Give data.validation and checkpoint.keep_best=true to a run; leave --best out to convert the newest."
    elif step == 0:
        problem = f"The best evaluation of '{run}' is that of step 0: training has made the model no better."
        remedy = "Use the model that it began with, or leave --best out to convert the newest checkpoint."
    else:
        problem = f"The best evaluation of '{run}' is that of step {step:,}, which has no checkpoint any more."
        remedy = "Set checkpoint.keep_best=true in the next run; leave --best out to convert the newest checkpoint"
        remedy += f", or give {earlier}, which was the best up to then." if earlier is not None else "."
    return UserError(problem, where=f"--best {run}", remedy=remedy)


def choose_checkpoint(
    world: World, run_dir: Path, resume: str, say: Callable[[str], None] = logger.info
) -> Path | None:
    """Decide what to resume from. Rank 0 lists, every rank checks its share of the files, all agree.

    Args:
        resume: auto (newest whole one, or a fresh start when there is none), must (newest whole one),
            never (fresh start), or the path of a checkpoint.
        say: gets a line now and then, where the check takes long.

    Raises:
        UserError: when `must` or a path finds none.
        DamagedError: when there are checkpoints but none is whole: never a silent fresh start.
    """
    if resume == "never":
        return None
    found = _together(world, lambda: candidates(run_dir) if resume in ("auto", "must") else _meant_by(resume))
    if found:
        return _newest_whole(found, lambda candidate: _faults_by_all(world, candidate, say))[0]
    if resume == "must":
        raise UserError(
            f"--resume must, but '{run_dir}' has no checkpoint.",
            where=f"run.dir={run_dir}",
            remedy="Correct run.dir, or start with --resume auto.",
        )
    return None


def newest_before(world: World, run_dir: Path, step: int) -> tuple[Path, CheckpointManifest] | None:
    """Find the newest whole checkpoint of an earlier step, the same on every rank; None when there is none."""
    found = [candidate for candidate in _together(world, lambda: candidates(run_dir)) if candidate.step < step]
    try:
        return _newest_whole(found, lambda candidate: _faults_by_all(world, candidate, logger.info)) if found else None
    except DamagedError:
        return None


def _together(world: World, find: Callable[[], list[Candidate]]) -> list[Candidate]:
    """Call `find` on rank 0, and return what it finds on every rank."""
    found, error = [], None
    if world.is_main:
        try:
            found = find()
        except (MaskwrightError, OSError) as caught:
            error = caught
    distributed.raise_on_all_ranks(world, error)
    return distributed.broadcast_from_main(world, found)


def find_candidate_faults(
    candidate: Candidate, *, read: bool = True, on_bytes: Callable[[int], None] | None = None
) -> list[str]:
    """Find why a checkpoint cannot be used, its manifest or its files. Arguments as of find_faults."""
    if candidate.manifest is None:
        return [candidate.fault]
    return find_faults(candidate.folder, candidate.manifest, read=read, on_bytes=on_bytes)


def _meant_by(source: str | Path) -> list[Candidate]:
    """Find the checkpoints that may be meant, the newest first: one, or those of a run."""
    path = user_path(source)
    match = _STEP_FOLDER.match(real_path(path).name)
    if match:
        if not path.is_dir():
            raise UserError(f"No checkpoint at '{path}'.", where=str(path), remedy=_names_beside(path))
        return [_candidate(path, int(match.group(1)))]
    found = candidates(path)
    if not found:
        raise UserError(
            f"'{path}' is neither a checkpoint nor a run folder with one.",
            where=str(path),
            remedy="Give the run.dir of a run that has saved, or one of its checkpoints/step-… folders.",
        )
    return found


def _newest_whole(found: list[Candidate], check: Callable[[Candidate], list[str]]) -> tuple[Path, CheckpointManifest]:
    """Find the first whole one of some; each that is stepped over is said loudly, since its steps are trained again."""
    damage = []
    for candidate in found:
        faults = check(candidate)
        if not faults and candidate.manifest is not None:
            return candidate.folder, candidate.manifest
        damage.append(f"{candidate.folder.name}: {listed(faults, _LISTED_FAULTS, '; ')}")
        if len(damage) < len(found):
            logger.warning("CHECKPOINT DAMAGED, an older one is tried: %s", damage[-1])
    if len(found) == 1:
        raise DamagedError(
            f"Checkpoint {damage[0]}.",
            where=str(found[0].folder),
            remedy="Use another one: `maskwright checkpoint list RUN` shows them. To start over, use --resume never.",
        )
    raise DamagedError(
        f"None of the {len(found)} checkpoints is whole. {' | '.join(damage[:_LISTED_FAULTS])}",
        where=str(found[0].folder.parent),
        remedy="`maskwright checkpoint verify RUN` names the damaged files. To start over, use --resume never.",
    )


def _faults_by_all(world: World, candidate: Candidate, say: Callable[[str], None]) -> list[str]:
    """Check a checkpoint on all ranks, each about the same number of bytes; every rank gets all faults."""
    manifest = candidate.manifest
    if manifest is None:
        return [candidate.fault]
    names = share_files(manifest.files, world.size)[world.rank]
    share_bytes = sum(manifest.files[name][0] for name in names)
    last_said = time.monotonic()

    def tell(done: int) -> None:
        nonlocal last_said
        if time.monotonic() - last_said >= _TELL_SECONDS:
            last_said = time.monotonic()
            share = f" of this rank's share of {manifest.bytes / 2**20:,.0f} MiB" if world.size > 1 else ""
            say(f"checking {candidate.folder.name}: {done / 2**20:,.0f} of {share_bytes / 2**20:,.0f} MiB{share}")

    faults = find_faults(candidate.folder, manifest, names, on_bytes=tell)
    return [fault for share in distributed.all_gather(world, faults) for fault in share]


def _names_beside(path: Path) -> str:
    names = sorted(other.name for other in path.parent.glob("step-*")) if path.parent.is_dir() else []
    return f"There are: {', '.join(names)}." if names else "Correct the path."
