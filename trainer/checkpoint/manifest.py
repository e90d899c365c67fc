"""The manifest of a checkpoint: what it holds and what it belongs to.

A checkpoint is a folder `step-NNNNNNNN` with a `manifest.json` whose files all have the recorded size and
hash. Anything else is not a checkpoint. The manifest is written last and the folder is renamed into place, so a
crash leaves the old checkpoint or the new one, never half of one.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trainer.errors import DamagedError
from trainer.files import file_hash, replace_synced
from trainer.state import TrainState

FORMAT = "maskwright-checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
MODEL_FOLDER = "huggingface"  # config.json and tokenizer, inside the checkpoint
PROBE = "probe.safetensors"
RUN_CONFIG = "config.yaml"  # of the start that saved it


@dataclass(frozen=True)
class Records:
    """What a checkpoint belongs to; the same for all checkpoints of one start.

    Attributes:
        layout: world_size, stage, precision: what DeepSpeed's files are shaped by.
        identity: what must not change silently over a resume: tokenizer, model, objective, seed, length.
        data_order: what decides which tokens sample t holds; it must not change for the samples consumed.
        model: a description for people (class, type, parameters).
    """

    layout: dict[str, Any]
    identity: dict[str, Any]
    data_order: dict[str, Any]
    model: dict[str, Any]


@dataclass(frozen=True)
class CheckpointManifest(Records):
    """Record of one checkpoint.

    Attributes:
        state: TrainState as a dict.
        files: path within the folder → (bytes, xxh3_128).
        versions: of the packages that wrote it.
        saved_at: seconds since 1970.
    """

    state: dict[str, int]
    files: dict[str, tuple[int, str]]
    versions: dict[str, str] = field(default_factory=dict)
    saved_at: float = 0.0

    @property
    def step(self) -> int:
        return self.state["step"]

    @property
    def bytes(self) -> int:
        return sum(size for size, _ in self.files.values())


def step_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:08d}"


def write_manifest(folder: Path, manifest: CheckpointManifest) -> None:
    content = {"format": FORMAT, "version": VERSION, **asdict(manifest)}
    replace_synced(folder / MANIFEST, (json.dumps(content, indent=1) + "\n").encode())


def read_manifest(folder: Path) -> CheckpointManifest:
    """Read `folder/manifest.json`.

    Raises:
        DamagedError: when it is missing, no JSON, or of another version.
    """
    path = folder / MANIFEST
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw.pop("format") != FORMAT or raw.pop("version") != VERSION:
            raise ValueError("written by another version of maskwright")
        files = {name: (int(size), str(digest)) for name, (size, digest) in raw.pop("files").items()}
        TrainState(**raw["state"])
        return CheckpointManifest(files=files, **raw)
    except FileNotFoundError:
        problem = "has no manifest"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"has a manifest that cannot be read ({error})"
    raise DamagedError(
        f"Checkpoint {folder.name} {problem}.",
        where=str(path),
        remedy="Resume from another one: maskwright checkpoint list.",
    )


def find_faults(folder: Path, manifest: CheckpointManifest, names: list[str] | None = None) -> list[str]:
    """Compare files with the manifest; one line for each fault, none when they are whole.

    Args:
        names: check only these (a rank's share); default all.
    """
    faults = []
    for name in manifest.files if names is None else names:
        size, digest = manifest.files[name]
        path = folder / name
        try:
            if not path.is_file():
                faults.append(f"{name}: missing")
            elif path.stat().st_size != size:
                faults.append(f"{name}: {path.stat().st_size:,} bytes instead of {size:,}")
            elif file_hash(path) != digest:
                faults.append(f"{name}: content differs from its checksum")
        except OSError as error:  # a fault like another: one rank must not leave the others waiting
            faults.append(f"{name}: {error.strerror}")
    return faults
