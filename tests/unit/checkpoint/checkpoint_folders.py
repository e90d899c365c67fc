"""Checkpoint folders for tests: small files under a real manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.checkpoint.manifest import CheckpointManifest, Records, step_folder, write_manifest
from trainer.runtime.files import file_hash
from trainer.state import TrainState

DATA_ORDER: dict[str, Any] = {
    "version": 1,
    "payload": 30,
    "chunk_blocks": 4,
    "window_chunks": 4,
    "seq_len": 32,
    "spans": [[0, 64, [64]]],
    "sources": [{"name": "wiki", "blocks": 100, "fingerprint": "abc", "quarantine": []}],
}
RECORDS = Records(
    layout={"world_size": 2, "stage": 1, "precision": "bf16"},
    identity={"tokenizer": "def", "seed": 0, "objective": {"mask_ratio": 0.15}},
    data_order=DATA_ORDER,
    model={"class": "RobertaForMaskedLM"},
)


def write_checkpoint(run_dir: Path, step: int, contents: dict[str, bytes] | None = None, **state: Any) -> Path:
    """A checkpoint of these files; default two, of which one is in a folder below. `state` is TrainState's."""
    if contents is None:
        contents = {name: f"{name} of step {step}".encode() for name in ("weights.pt", "sub/config.json")}
    folder = step_folder(run_dir / "checkpoints", step)
    files = {}
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        files[name] = (len(content), file_hash(folder / name))
    counters = TrainState(step=step, samples=8 * step, tokens=256 * step, **state).to_dict()
    manifest = CheckpointManifest(**vars(RECORDS), state=counters, files=files, versions={"torch": "2"}, saved_at=1.5)
    write_manifest(folder, manifest)
    return folder
