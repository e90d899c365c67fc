"""The run folder before training writes there: what a start leaves behind is moved, its inputs are frozen.

A file of the user's that has a name which the run writes is never moved or replaced: the start is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from trainer.checkpoint.manifest import DATA_ORDER, RUN_CONFIG
from trainer.checkpoint.resume import set_aside, set_aside_newer
from trainer.config import Config
from trainer.config.file import dump_config
from trainer.engine.deepspeed_config import ALLOWED_KEYS
from trainer.errors import UserError
from trainer.inputs.inputs import Inputs, sha256_of
from trainer.runtime.side_files import read_json_object, replace_side_file
from trainer.runtime.user_files import to_yaml
from trainer.state import TrainState

_STEP_FIRST = b'{"step": '
_SECTIONS = {"run", "model", "data", "objective", "batch", "optimizer", "schedule", "train", "checkpoint", "eval"}


def check_replaceable(run_dir: Path, resume: str, checkpoint: Path | None) -> None:
    """Refuse a start that would replace, or move away, a file by the name of its own that maskwright has not written.

    Raises:
        UserError: naming the file.
    """
    replaced: list[tuple[str, Callable[[Path], bool]]] = []
    if resume != "never":  # which moves it aside
        replaced += [("examples.jsonl", _has_steps)]  # an earlier version's run had none
    if checkpoint is None and resume != "never":
        replaced += [("metrics.jsonl", _has_steps)]
    if checkpoint is None or resume == "never":
        replaced += [("config.yaml", _is_frozen_config), ("deepspeed.json", _is_frozen_deepspeed)]
    for name, is_own in replaced:
        path = run_dir / name
        if path.is_file() and not is_own(path):
            raise UserError(
                f"'{path}' is not of maskwright's making, and the run writes its own {name} there.",
                where=f"run.dir={run_dir}",
                remedy="Move it to another place, or give another run.dir.",
            )


def _has_steps(path: Path) -> bool:
    """Tell whether a run wrote a file of lines: one begins with a step. A crash leaves lines cut off, or zeros."""
    try:
        with open(path, "rb") as file:
            begins = [line[: len(_STEP_FIRST)] for line in file if line.strip(b"\0 \r\n")]
    except OSError:
        return True  # which its writer explains
    return _STEP_FIRST in begins or not begins or (len(begins) == 1 and _STEP_FIRST.startswith(begins[0]))


def _is_frozen_config(path: Path) -> bool:
    """Tell whether a run wrote it, of whatever version; so counts what cannot be understood, as after a crash."""
    try:
        text = path.read_text(encoding="utf-8")
        found = yaml.safe_load(text)
        dumps = (to_yaml(found), yaml.safe_dump(found, sort_keys=False, width=120))  # as it is written now, and was
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return True
    return not isinstance(found, dict) or (text in dumps and found.keys() >= _SECTIONS)


def _is_frozen_deepspeed(path: Path) -> bool:
    """Tell whether it has what a run adds to a preset; so counts what cannot be understood, as after a crash."""
    found = read_json_object(path)
    return found is None or "train_micro_batch_size_per_gpu" in found


def settle(
    run_dir: Path, inputs: Inputs, say: Callable[[str], None], resume: str, checkpoint: Path | None, state: TrainState
) -> None:
    """Move what this start leaves behind, and freeze the resolved inputs, before anything else is written."""
    moved = None
    if resume == "never":
        moved = set_aside(run_dir)
    elif resume not in ("auto", "must"):
        moved = set_aside_newer(run_dir, state.step)
    if moved is not None:
        say(f"moved what this start does not continue to {moved}")
    _freeze(run_dir, inputs, say, checkpoint)


def _freeze(run_dir: Path, inputs: Inputs, say: Callable[[str], None], checkpoint: Path | None) -> None:
    """Write the resolved inputs at the first start; on a resume say what has changed since the checkpoint was saved."""
    config_path, preset_path = run_dir / "config.yaml", run_dir / "deepspeed.json"
    if checkpoint is not None:
        saved = {"defaults": 1, **yaml.safe_load((checkpoint / RUN_CONFIG).read_text(encoding="utf-8"))}
        with suppress(ValidationError):  # a key that the checkpoint's version did not know was as its default is
            saved = Config.model_validate(saved).model_dump(mode="json")
        changes = _changes(saved, inputs.config.model_dump(mode="json"))
        frozen = read_json_object(preset_path)
        if saved["deepspeed"] == inputs.config.deepspeed and frozen is not None:  # one name: its content may differ
            before, now = ({key: given.get(key) for key in ALLOWED_KEYS} for given in (frozen, inputs.ds_config))
            changes += _changes(before, now)
        if changes:
            say(f"changed since {checkpoint.name} was saved: {', '.join(changes)}")
    if read_json_object(preset_path) is None and os.path.lexists(preset_path):
        say(f"{preset_path} cannot be read, and is written anew")
        checkpoint = None
    if checkpoint is None or not config_path.is_file():
        replace_side_file(config_path, dump_config(inputs.config).encode())
        replace_side_file(preset_path, (json.dumps(inputs.ds_config, indent=2) + "\n").encode())
    _freeze_order(run_dir, inputs)


def _freeze_order(run_dir: Path, inputs: Inputs) -> None:
    """Record the data order; on a resume it may have grown by what lies ahead."""
    order = inputs.data_order(with_shards=True)
    content = json.dumps({**order, "sha256": sha256_of(order)}, indent=1) + "\n"
    path = run_dir / DATA_ORDER
    if not path.is_file() or path.read_bytes() != content.encode():
        replace_side_file(path, content.encode())


def _changes(before: Any, after: Any, prefix: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        names = sorted({*before, *after})
        return [line for name in names for line in _changes(before.get(name), after.get(name), f"{prefix}{name}.")]
    return [] if before == after else [f"{prefix[:-1]} {before} → {after}"]
