"""The same losses whatever the ranks, workers, micro-batches and ZeRO stages; and a resume that changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.ranks import ADDING, losses, tiny_config, train
from trainer.errors import EXIT_FINISHED

VARIANTS: dict[str, tuple[int, dict[str, Any]]] = {
    "2 ranks": (2, ADDING),
    "1 worker": (1, {"data": {"workers": 1}}),
    "3 workers": (1, {"data": {"workers": 3}}),
    "micro-batch 2": (1, ADDING),
    "micro-batch 8": (1, {"batch": {"micro_size": 8}}),
    "ZeRO-0": (1, {"deepspeed": "zero0"}),
    "ZeRO-2": (1, {"deepspeed": "zero2"}),
    "ZeRO-3": (1, {"deepspeed": "zero3"}),
    "ZeRO-0, 2 ranks": (2, {"deepspeed": "zero0", **ADDING}),
    "ZeRO-2, 2 ranks": (2, {"deepspeed": "zero2", **ADDING}),
    "ZeRO-3, 2 ranks": (2, {"deepspeed": "zero3", **ADDING}),
    "ZeRO-2 offload, 2 ranks": (2, {"deepspeed": "zero2_offload"}),
    "ZeRO-3 offload, 2 ranks": (2, {"deepspeed": "zero3_offload"}),
    "activation checkpointing": (1, {"model": {"activation_checkpointing": True}}),
}


@pytest.fixture(scope="module")
def reference(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """20 steps on one rank, ZeRO-1, micro-batch 4, no workers; fp32, dropout 0."""
    run_dir = tmp_path_factory.mktemp("reference")
    assert train(tiny_config(workspace, run_dir)) == EXIT_FINISHED
    found = losses(run_dir)
    assert len(found) == 20
    assert found[-1] < found[0] - 0.3, "the model does not learn, so equal losses would say little"
    return found


@pytest.mark.parametrize("name", VARIANTS)
def test_losses_do_not_depend_on_the_layout(name: str, reference: list[float], workspace: Path, tmp_path: Path) -> None:
    ranks, sections = VARIANTS[name]
    assert train(tiny_config(workspace, tmp_path, **sections), ranks) == EXIT_FINISHED
    assert losses(tmp_path) == pytest.approx(reference, abs=1e-5, rel=0)
