"""The probe in a checkpoint: what it says, and how much of it a CPU computes again."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

from trainer.checkpoint.contents import PROBE_ROWS, Probe, read_probe, save_probe
from trainer.checkpoint.manifest import PROBE


def probe_of(device: str, blocks: int = 4, predictions: int = 3) -> Probe:
    index = torch.arange(blocks * predictions)
    return Probe({"input_ids": torch.ones(blocks, 16, dtype=torch.int64)}, index, torch.randn(PROBE_ROWS, 50), device)


def test_a_gpus_probe_says_so_and_a_cpu_computes_one_block_of_it(tmp_path: Path) -> None:
    """Gpu A12: 128 blocks of roberta-base would take a login node minutes and gigabytes."""
    save_probe(probe_of("cuda"), tmp_path)
    found = read_probe(tmp_path)
    assert found.device == "cuda" and found.inputs["input_ids"].shape == (4, 16)
    least = found.for_cpu()
    assert least.inputs["input_ids"].shape == (1, 16)
    assert least.prediction_index.tolist() == [0, 1, 2]
    assert torch.equal(least.logits, found.logits[:3]), "of the rows that are kept, those of the first block"
    assert len(probe_of("cuda", predictions=20).for_cpu().logits) == PROBE_ROWS


def test_a_cpus_probe_is_computed_as_in_training_and_its_file_is_as_ever(tmp_path: Path) -> None:
    save_probe(probe_of("cpu"), tmp_path)
    with safe_open(tmp_path / PROBE, "pt") as file:
        assert file.metadata() is None
    found = read_probe(tmp_path)
    assert found.device == "cpu" and found.for_cpu() is found
