"""A run on a GPU goes on bit for bit where it is deterministic, and its model is proven on a machine without one."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoModelForMaskedLM

from tests.commands import maskwright
from tests.gpu.runs import MARKS, ROBERTA, losses_of, only_on_a_gpu, trained, write_run
from trainer.errors import EXIT_FINISHED

pytestmark = MARKS
DROPOUT = {"overrides": {**ROBERTA, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.0}}


def test_a_deterministic_run_resumes_bit_for_bit(workspace: Path, tmp_path: Path) -> None:
    sections = {"model": DROPOUT, "train": {"deterministic": True}, "checkpoint": {"every_steps": 5, "async": True}}
    whole = write_run(workspace, tmp_path / "whole", **sections)
    trained(whole)
    again = write_run(workspace, tmp_path / "again", **sections)
    trained(again)
    assert losses_of(again) == losses_of(whole), "two starts have the same bits"
    parts = write_run(workspace, tmp_path / "parts", **sections)
    trained(parts, "train.steps=7")
    assert "resuming from step-00000007" in trained(parts)
    assert losses_of(parts) == losses_of(whole)


def test_its_model_is_proven_without_a_gpu(workspace: Path, tmp_path: Path) -> None:
    config = write_run(workspace, tmp_path)
    trained(config)
    output = tmp_path / "model"
    result = maskwright("convert", tmp_path / "run", "--output", output, CUDA_VISIBLE_DEVICES="")
    assert result.returncode == EXIT_FINISHED, result.stdout + result.stderr
    assert AutoModelForMaskedLM.from_pretrained(output).config.hidden_size == ROBERTA["hidden_size"]


@only_on_a_gpu
def test_the_usual_run_uses_the_triton_kernel(workspace: Path, tmp_path: Path) -> None:
    assert "cross-entropy: the Triton kernel, which agrees with torch's here" in trained(write_run(workspace, tmp_path))


def test_the_doctor_finds_nothing_wrong(tmp_path: Path) -> None:
    result = maskwright("doctor", cwd=tmp_path)
    assert result.returncode == EXIT_FINISHED, result.stdout + result.stderr
