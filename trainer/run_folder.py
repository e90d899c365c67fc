"""The run folder before training writes there: what a start leaves behind is moved, its inputs are frozen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from trainer.checkpoint.manifest import RUN_CONFIG
from trainer.checkpoint.resume import DATA_ORDER, set_aside, set_aside_newer
from trainer.config_file import dump_config
from trainer.deepspeed_config import ALLOWED_KEYS
from trainer.files import replace_synced
from trainer.inputs import Inputs, sha256_of
from trainer.state import TrainState


def settle(
    run_dir: Path, inputs: Inputs, say: Callable[[str], None], resume: str, checkpoint: Path | None, state: TrainState
) -> None:
    """Before anything is written: move what this start leaves behind, and freeze the resolved inputs."""
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
        saved = yaml.safe_load((checkpoint / RUN_CONFIG).read_text(encoding="utf-8"))
        changes = _changes({"defaults": 1, **saved}, inputs.config.model_dump(mode="json"))
        if saved["deepspeed"] == inputs.config.deepspeed and preset_path.is_file():  # one name: its content may differ
            frozen = json.loads(preset_path.read_text(encoding="utf-8"))
            before, now = ({key: given.get(key) for key in ALLOWED_KEYS} for given in (frozen, inputs.ds_config))
            changes += _changes(before, now)
        if changes:
            say(f"changed since {checkpoint.name} was saved: {', '.join(changes)}")
    if checkpoint is None or not config_path.is_file():
        replace_synced(config_path, dump_config(inputs.config).encode())
        replace_synced(preset_path, (json.dumps(inputs.ds_config, indent=2) + "\n").encode())
    _freeze_order(run_dir, inputs)


def _freeze_order(run_dir: Path, inputs: Inputs) -> None:
    """Record the data order; on a resume it may have grown by what lies ahead."""
    order = inputs.data_order(with_shards=True)
    content = json.dumps({**order, "sha256": sha256_of(order)}, indent=1) + "\n"
    path = run_dir / DATA_ORDER
    if not path.is_file() or path.read_text(encoding="utf-8") != content:
        replace_synced(path, content.encode())


def _changes(before: Any, after: Any, prefix: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        names = sorted({*before, *after})
        return [line for name in names for line in _changes(before.get(name), after.get(name), f"{prefix}{name}.")]
    return [] if before == after else [f"{prefix[:-1]} {before} → {after}"]
