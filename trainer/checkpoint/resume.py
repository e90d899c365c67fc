"""What must be equal before a checkpoint is loaded, and what a fresh start does with an old run."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from trainer.checkpoint.find import candidates, checkpoints_folder
from trainer.checkpoint.identity import has_own_code
from trainer.checkpoint.manifest import DATA_ORDER, MODEL_FOLDER, CheckpointManifest, Records
from trainer.checkpoint.zero_files import ZeroFiles
from trainer.config import ObjectiveConfig, OptimizerConfig
from trainer.data.order.compare import order_differences
from trainer.errors import UserError
from trainer.inputs.inputs import sha256_of
from trainer.runtime.paths import real_path
from trainer.runtime.side_files import read_json_object

_REPORTS = ("metrics.jsonl", "examples.jsonl")  # line by line, of each step


def check_resumable(folder: Path, manifest: CheckpointManifest, current: Records, data_order: dict[str, Any]) -> None:
    """Refuse a checkpoint of another model, tokenizer, data order or objective.

    Args:
        data_order: of this start; the checkpoint's must be the same for the samples that it has consumed.

    Raises:
        UserError: with each difference.
    """
    # Which was in the identity alone, before there were stages.
    ratio = {"mask_ratio": recorded_objective(manifest.identity)["mask_ratio"]}
    saved_order = {**ratio, **_with_shards(folder, manifest.data_order)}
    differences = [
        *identity_differences(manifest.identity, current.identity),
        *order_differences(saved_order, data_order, manifest.state["samples"]),
    ]
    if differences:
        code = f" The model's code as it was is in {folder / MODEL_FOLDER}." if has_own_code(manifest) else ""
        raise UserError(
            f"Checkpoint {folder.name} belongs to another run: {'; '.join(differences)}.",
            where=str(folder),
            remedy="Restore these settings to resume it, or start a new run in another run.dir. To continue from its "
            f"weights on other data, convert it and set model.from_pretrained.{code}",
        )


def identity_differences(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Say how two identities differ in what belongs to a run; a key that one was written without is its default."""
    return [*_differences(_without_stages(saved), _without_stages(current)), *_teachers(saved, current)]


def describe_layout(saved: dict[str, Any], current: dict[str, Any]) -> str:
    """Say how the training state is spread anew over ranks, such as "stage 1 × 8 ranks → stage 3 × 2 ranks".

    Returns:
        empty when ranks, stage and precision are what they were.
    """
    return "" if saved == current else f"{_layout(saved)} → {_layout(current)}"


def describe_frozen_change(folder: Path, sizes: Mapping[str, int], frozen: Collection[str]) -> str:
    """Say which weights begin to train with a resume, and which no longer do; empty where they are the same.

    Args:
        sizes: elements of each parameter.
        frozen: names of those that are frozen from here on.

    Raises:
        DamagedError: when the checkpoint's own cannot be read.
    """
    before = ZeroFiles(folder, places=()).frozen.keys()
    changes = (
        ([name for name in before if name not in frozen], "begin to train, with fresh moments"),
        ([name for name in frozen if name not in before], "are kept as they are from here on"),
    )
    lines = [
        f"{len(names):,} weights of {sum(sizes.get(name, 0) for name in names):,} parameters {what}"
        for names, what in changes
        if names
    ]
    return "; ".join(lines)


def _layout(layout: dict[str, Any]) -> str:
    ranks = layout["world_size"]
    accumulation = layout.get("gradient_accumulation_dtype")
    accumulated = f", gradients accumulated in {accumulation}" if accumulation else ""
    return f"stage {layout['stage']} × {ranks:,} rank{'s' if ranks > 1 else ''}, {layout['precision']}{accumulated}"


def _with_shards(folder: Path, saved: dict[str, Any]) -> dict[str, Any]:
    """Return the checkpoint's data order, with the shards that its run folder records if they belong to it."""
    frozen = read_json_object(real_path(folder).parent.parent / DATA_ORDER)
    if frozen is None:
        return saved
    digest = frozen.pop("sha256", None)
    if digest is not None and digest != sha256_of(frozen):  # it is only more precise than the checkpoint's own
        return saved
    try:
        prints = [[source["fingerprint"] for source in order["sources"]] for order in (saved, frozen)]
    except (LookupError, TypeError):
        return saved
    return {**saved, "sources": frozen["sources"]} if prints[0] == prints[1] else saved


def recorded_objective(identity: dict[str, Any]) -> dict[str, Any]:
    """Return the objective of a checkpoint; a key that it was written without was as the default is."""
    recorded = identity.get("objective")
    return {**ObjectiveConfig().model_dump(), **(recorded if isinstance(recorded, dict) else {})}


def _without_stages(identity: dict[str, Any]) -> dict[str, Any]:
    """Spread the objective over names of its own, without what may change in the course of a run.

    A teacher may move to another place. Its weights are compared by `_teachers`.
    """
    before = {"optimizer": OptimizerConfig().family}  # of checkpoints from before there was another one
    identity = {name: value for name, value in {**before, **identity}.items() if name != "teacher"}
    if not isinstance(identity.get("objective"), dict):  # what is no section at all differs, and is refused
        return identity
    objective = {f"objective.{key}": value for key, value in recorded_objective(identity).items()}
    del objective["objective.mask_ratio"]
    if isinstance(teacher := objective["objective.teacher"], dict):
        objective["objective.teacher"] = {key: value for key, value in teacher.items() if key != "model"}
    return {**{name: value for name, value in identity.items() if name != "objective"}, **objective}


def _teachers(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Say which teachers two runs have, if each has one and their weights differ."""
    if None in (teachers := [identity.get("teacher") for identity in (saved, current)]) or teachers[0] == teachers[1]:
        return []
    places = [(recorded_objective(identity)["teacher"] or {}).get("model") for identity in (saved, current)]
    before, now = (f"{place} (weights {teacher})" for place, teacher in zip(places, teachers, strict=True))
    return [f"the teacher was {before}, now {now}"]


def _differences(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    names = sorted({*saved, *current})
    return [
        f"{name} was {saved.get(name, 'off')}, now {current.get(name, 'off')}"
        for name in names
        if saved.get(name) != current.get(name)
    ]


def set_aside(run_dir: Path) -> Path | None:
    """Move an earlier run's files into RUN/previous-N, so that a fresh start loses nothing.

    Returns:
        The folder they went to, or None when there was nothing.
    """
    names = ("checkpoints", *_REPORTS, "tensorboard", "config.yaml", "deepspeed.json", DATA_ORDER)
    present = [run_dir / name for name in names if (run_dir / name).exists()]
    if not present:
        return None
    target = _new_previous_folder(run_dir)
    for path in present:
        path.rename(target / path.name)
    return target


def set_aside_newer(run_dir: Path, step: int, always_metrics: bool = False) -> Path | None:
    """Move whole checkpoints after `step`, with copies of the reports, into RUN/previous-N: a branch that is left.

    Otherwise `--resume auto` would take up the old branch again after a stop.

    Args:
        always_metrics: copy metrics and examples even if there is no such checkpoint.

    Returns:
        The folder they went to, or None when there was nothing.
    """
    newer = [candidate for candidate in candidates(run_dir) if candidate.step > step and candidate.manifest is not None]
    if not newer and not always_metrics:
        return None
    target = _new_previous_folder(run_dir)
    (target / "checkpoints").mkdir()
    for candidate in newer:
        candidate.folder.rename(target / "checkpoints" / candidate.folder.name)
    for name in _REPORTS:
        if (run_dir / name).is_file():
            shutil.copy2(run_dir / name, target)
    return target


def is_own(run_dir: Path, checkpoint: Path) -> bool:
    """Tell whether a checkpoint lies among those of the run."""
    return real_path(checkpoint).parent == real_path(checkpoints_folder(run_dir))


def check_place(run_dir: Path, checkpoint: Path) -> None:
    """Refuse to mix two runs: a checkpoint of another run may only start an empty run folder.

    Raises:
        UserError: naming both.
    """
    if not is_own(run_dir, checkpoint) and candidates(run_dir):
        raise UserError(
            f"'{checkpoint}' is a checkpoint of another run, and '{run_dir}' has checkpoints of its own.",
            where=f"--resume {checkpoint}, run.dir={run_dir}",
            remedy="Give a new run.dir, or one of its own checkpoints.",
        )


def _new_previous_folder(run_dir: Path) -> Path:
    number = 1
    while (run_dir / f"previous-{number}").exists():
        number += 1
    target = run_dir / f"previous-{number}"
    target.mkdir()
    return target
