"""A checkpoint of any number of ranks and any ZeRO stage resumes under any other.

Here each pair of stages and each pair of numbers of ranks is met once; all 144 pairs are in docs/resume-matrix.md.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.elastic_matrix import (
    LAYOUTS,
    SAVED_STEP,
    Layout,
    difference,
    layout_config,
    reshape,
    resume_all,
    save_all,
)
from tests.ranks import losses, train
from trainer.checkpoint.zero_files import ZeroFiles
from trainer.config import Config
from trainer.engine.partitions import MOMENTS, WEIGHT
from trainer.errors import EXIT_FINISHED

STAGES = (0, 1, 2, 3)
SHORT = {"train": {"steps": 10}}
RANKS = ((1, 2), (2, 3), (3, 1), (2, 1), (3, 2), (1, 3), (2, 2), (3, 3), (1, 1))
PAIRS = [
    (Layout(RANKS[number % 9][0], before), Layout(RANKS[number % 9][1], after))
    for number, (before, after) in enumerate((before, after) for before in STAGES for after in STAGES)
]


@pytest.fixture(scope="module")
def saved(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, Config]:
    folder = tmp_path_factory.mktemp("saved")
    return {layout: layout_config(workspace, folder / str(layout), layout, **SHORT) for layout in LAYOUTS}


@pytest.fixture(scope="module")
def uninterrupted(saved: dict[Layout, Config]) -> list[float]:
    return save_all(saved)


def test_any_stage_and_number_of_ranks_resumes_under_any_other(
    saved: dict[Layout, Config], uninterrupted: list[float], workspace: Path, tmp_path: Path
) -> None:
    found = resume_all(saved, PAIRS, tmp_path, workspace, **SHORT)
    differences = {f"{before} → {after}": difference(found[before, after], uninterrupted) for before, after in found}
    assert len(differences) == 16
    assert max(differences.values()) <= 1e-5, differences
    assert uninterrupted[-1] < uninterrupted[4] - 0.2, "the model does not learn, so equal losses would say little"


FP32 = {"train": {"steps": SAVED_STEP}}
BF16 = {"train": {"steps": SAVED_STEP, "precision": "bf16"}}
FP32_ACCUMULATION = {"train": {**BF16["train"], "gradient_accumulation_dtype": "fp32"}}
# name → (ranks, preset, sections) of who saves, and of who resumes
RESHAPES: dict[str, tuple[tuple[int, str, Any], tuple[int, str, Any]]] = {
    "bf16": ((2, "zero1", BF16), (1, "zero3", BF16)),
    "bf16, back": ((1, "zero3", BF16), (3, "zero2", BF16)),
    "bf16, into fp32 accumulation": ((2, "zero2", BF16), (3, "zero1", FP32_ACCUMULATION)),
    "bf16, out of fp32 accumulation": ((3, "zero1", FP32_ACCUMULATION), (2, "zero3", BF16)),
    "fp32 to bf16": ((2, "zero0", FP32), (2, "zero1", BF16)),
    "bf16 to fp32": ((2, "zero3", BF16), (1, "zero0", FP32)),
    "into offload": ((1, "zero1", FP32), (2, "zero2_offload", FP32)),
    "offload to offload": ((2, "zero2_offload", FP32), (3, "zero3_offload", FP32)),
    "out of offload": ((2, "zero3_offload", FP32), (1, "zero0", FP32)),
}


@pytest.mark.parametrize("name", RESHAPES)
def test_master_weights_and_moments_are_bit_equal_after_reshaping(name: str, workspace: Path, tmp_path: Path) -> None:
    (ranks, preset, sections), (new_ranks, new_preset, new_sections) = RESHAPES[name]
    before = layout_config(workspace, tmp_path / "run", Layout(ranks, 1), **{**sections, "deepspeed": preset})
    after = layout_config(
        workspace, tmp_path / "other", Layout(new_ranks, 1), **{**new_sections, "deepspeed": new_preset}
    )
    assert train(before, ranks) == EXIT_FINISHED
    checkpoint = tmp_path / "run" / "checkpoints" / f"step-{SAVED_STEP:08d}"
    reshape(checkpoint, after, new_ranks, tmp_path / "reshaped" / checkpoint.name)
    saved, reshaped = ZeroFiles(checkpoint), ZeroFiles(tmp_path / "reshaped" / checkpoint.name)
    assert reshaped.ranks == (new_ranks if reshaped.stage else 1)
    assert reshaped.adam_step == saved.adam_step == SAVED_STEP
    assert reshaped.shapes.keys() == saved.shapes.keys()
    for parameter, shape in saved.shapes.items():
        for kind in (WEIGHT, *MOMENTS):
            one, other = torch.empty(shape.numel()), torch.empty(shape.numel())
            saved.read_into(parameter, 0, one, kind)
            reshaped.read_into(parameter, 0, other, kind)
            assert torch.equal(one, other), (parameter, kind)
            assert "embeddings.weight" not in parameter or one.abs().sum() > 0, "zeros would be equal to anything"


def test_bf16_losses_after_another_layout_are_the_uninterrupted_ones_within_bf16s_own_noise(
    workspace: Path, tmp_path: Path
) -> None:
    """The tolerance is what two uninterrupted bf16 runs of different layouts differ by: sums in another order."""
    longer = {"train": {**BF16["train"], "steps": 15}}
    config = layout_config(workspace, tmp_path / "run", Layout(2, 1), **longer)
    assert train(config, 2) == EXIT_FINISHED
    found = resume_all({Layout(2, 1): config}, [(Layout(2, 1), Layout(1, 3))], tmp_path, workspace, **longer)
    ((_, resumed),) = found.items()
    assert difference(resumed, losses(tmp_path / "run")) <= 0.005


def test_the_change_of_layout_is_said_in_one_line(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = layout_config(workspace, tmp_path / "run", Layout(2, 1))
    assert train(config, 2) == EXIT_FINISHED
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000015")
    capsys.readouterr()
    assert train(layout_config(workspace, tmp_path / "run", Layout(1, 3)), 1) == EXIT_FINISHED
    expected = "resuming in another layout: stage 1 × 2 ranks, fp32 → stage 3 × 1 rank, fp32, step 10"
    assert expected in capsys.readouterr().out
