"""Small runs of `maskwright train` on the GPU, and the same on the CPU to compare with.

`make test-gpu` runs these tests; they are skipped where there is no GPU. `MASKWRIGHT_GPU_TESTS=rehearse` runs them on
the CPU, which shows that the tests work, and nothing of a GPU.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.commands import maskwright
from tests.ranks import ON_GPUS, WITHOUT_DROPOUT, losses
from trainer.errors import EXIT_FINISHED

REHEARSED = os.environ.get("MASKWRIGHT_GPU_TESTS") == "rehearse"
only_on_a_gpu = pytest.mark.skipif(not ON_GPUS, reason="it says nothing without a GPU")
MARKS = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        not (REHEARSED or (ON_GPUS and torch.cuda.is_available())),
        reason="no GPU is asked for: `make test-gpu` on a machine with one",
    ),
]
"""Of each module of tests here."""
ROBERTA = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 256,
    "max_position_embeddings": 130,
    **WITHOUT_DROPOUT,
}
NEZHA = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 256,
    "max_relative_position": 16,
}
MODERNBERT = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 192,
    "max_position_embeddings": 256,
    "local_attention": 32,
    "global_attn_every_n_layers": 3,
}


def write_run(workspace: Path, folder: Path, **sections: Any) -> Path:
    """A config of 12 steps in `folder`, whose sections are merged over what all have; returns its path."""
    defaults: dict[str, Any] = {
        "run": {"dir": str(folder / "run"), "seed": 3},
        "model": {"preset": "roberta-base", "tokenizer": str(workspace / "tokenizer"), "overrides": ROBERTA},
        "data": {"train": str(workspace / "data"), "seq_len": 128, "chunk_blocks": 8, "window_chunks": 4},
        "batch": {"global_size": 16, "micro_size": 4},
        "optimizer": {"lr": 1.0e-3},
        "schedule": {"name": "constant", "warmup_steps": 0},
        "train": {"steps": 12, "precision": "bf16"},
        "checkpoint": {"every_steps": None},
        "eval": {"every_steps": None},
        "logging": {"every_steps": 1, "tensorboard": False},
    }
    for name, section in sections.items():
        defaults[name] = {**defaults.get(name, {}), **section} if isinstance(section, dict) else section
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(defaults))
    return path


def trained(config: Path, *overrides: str, **variables: str) -> str:
    """Train to the end, and return what was said."""
    result = maskwright("train", config, *overrides, **variables)
    assert result.returncode == EXIT_FINISHED, result.stdout + result.stderr
    return result.stdout


def losses_of(config: Path) -> list[float]:
    return losses(config.parent / "run")
