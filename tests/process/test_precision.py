"""What is said of a precision at the start: on a GPU that emulates it, and where many gradients are added up in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import tiny_config
from trainer.engine.precision import precision_notes
from trainer.inputs.inputs import open_inputs

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(("has_it", "said"), [(True, []), (False, ["bf16: THIS GPU CANNOT COMPUTE IN IT"])])
def test_a_gpu_that_emulates_bf16_is_named(has_it: bool, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Gpu S10: torch says that a V100 or T4 supports it, for it can emulate it."""
    asked = []

    def supported(including_emulation: bool = True) -> bool:
        asked.append(including_emulation)
        return has_it

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert [line.partition(",")[0] for line in precision_notes("bf16", GPU)] == said
    assert asked == [False]
    assert precision_notes("fp16", GPU) == []


def test_fp32_on_a_gpu_is_said_to_be_exact_and_a_cpu_has_no_notes() -> None:
    """Gpu S16: maskwright never uses TF32."""
    assert len(precision_notes("fp32", GPU)) == 1 and "TF32" in precision_notes("fp32", GPU)[0]
    assert [precision_notes(name, torch.device("cpu")) for name in ("fp32", "bf16", "fp16")] == [[], [], []]


@pytest.mark.parametrize(
    ("train", "micro_batches", "warns"),
    [
        ({"precision": "bf16"}, 32, True),
        ({"precision": "bf16"}, 31, False),
        ({"precision": "bf16", "gradient_accumulation_dtype": "fp32"}, 32, False),
        ({"precision": "fp32"}, 32, False),
    ],
)
def test_many_gradients_added_up_in_bf16_are_warned_of(
    train: dict[str, Any], micro_batches: int, warns: bool, workspace: Path, tmp_path: Path
) -> None:
    """Gpu S2."""
    batch = {"global_size": 2 * micro_batches, "micro_size": 2}
    lines = open_inputs(tiny_config(workspace, tmp_path, batch=batch, train={"steps": 2, **train}), 1).describe()
    found = [line for line in lines if f"the gradients of {micro_batches} micro-batches in bf16" in line]
    assert len(found) == warns
    assert all("train.gradient_accumulation_dtype=fp32" in line for line in found)
