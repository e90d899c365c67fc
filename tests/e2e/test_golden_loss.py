"""The loss curve of one small run, kept: a change that alters training in any way shows here.

When the change is meant, write the curve anew and say why in CHANGELOG.md:

    OMP_NUM_THREADS=1 python -m tests.e2e.test_golden_loss
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest

from tests.conftest import make_workspace
from tests.ranks import TWO_LAYERS, losses, tiny_config, train
from trainer.config import Config
from trainer.data.manifest import read_data_manifest
from trainer.errors import EXIT_FINISHED

GOLDEN = Path(__file__).parents[1] / "golden" / "loss_curve.json"
TOLERANCE = 1e-3  # nats; other CPUs and builds of torch sum in another order


def config_of(workspace: Path, run_dir: Path) -> Config:
    return tiny_config(workspace, run_dir, model={"overrides": TWO_LAYERS})


def test_the_losses_of_twenty_steps_are_those_kept(workspace: Path, tmp_path: Path) -> None:
    golden = json.loads(GOLDEN.read_text())
    fingerprint = read_data_manifest(workspace / "data" / "train").fingerprint
    assert fingerprint == golden["data_fingerprint"], "the text, the tokenizer or prepare has changed, not training"
    assert train(config_of(workspace, tmp_path)) == EXIT_FINISHED
    assert losses(tmp_path) == pytest.approx(golden["losses"], abs=TOLERANCE, rel=0)


def write_golden() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_workspace(folder)
        assert train(config_of(folder, folder / "run")) == EXIT_FINISHED
        fingerprint = read_data_manifest(folder / "data" / "train").fingerprint
        curve = {"data_fingerprint": fingerprint, "losses": [round(loss, 6) for loss in losses(folder / "run")]}
    GOLDEN.write_text(json.dumps(curve, indent=1) + "\n")
    print(f"wrote {GOLDEN}")


if __name__ == "__main__":
    write_golden()
