"""What a rollback leaves in the run folder, for a run that is lost before its next save."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from tests.unit.checkpoint.checkpoint_folders import DATA_ORDER, write_checkpoint
from trainer.checkpoint.find import candidates
from trainer.checkpoint.manifest import read_checkpoint_manifest
from trainer.checkpoint.rollback import last_good, leave_branch
from trainer.data.order.compare import order_differences
from trainer.runtime.distributed import World
from trainer.state import TrainState

ALONE = World(0, 1, 0, torch.device("cpu"), None)


def test_the_checkpoint_takes_over_state_and_data_order_and_later_ones_are_set_aside(tmp_path: Path) -> None:
    """The data order has changed since it was saved, ahead of it; the samples passed over reach into the new part."""
    for step in (4, 8, 12):
        write_checkpoint(tmp_path, step)
    now = {**DATA_ORDER, "spans": [[0, 64, [64]], [64, 128, [32]]]}
    diverged = TrainState(step=13, samples=104, tokens=3328)
    found = last_good(ALONE, tmp_path, diverged, onset=8)
    assert found is not None
    folder, manifest = found
    assert manifest.step == 4
    state = diverged.rolled_back_to(TrainState(**manifest.state), "a test")
    rewound: list[int] = []
    moved = leave_branch(ALONE, tmp_path, folder, manifest, state, now, lambda: rewound.append(1))
    assert rewound == [1]
    after = read_checkpoint_manifest(folder)
    assert (after.step, after.state["samples"]) == (4, 104)
    assert after.files == manifest.files and after.layout == manifest.layout
    assert order_differences(after.data_order, now, after.state["samples"]) == []
    assert order_differences(replace(after, data_order=DATA_ORDER).data_order, now, 104) != []
    assert [candidate.step for candidate in candidates(tmp_path)] == [4]
    assert [candidate.step for candidate in candidates(moved)] == [12, 8]
