"""Gpu A8: train.deterministic as far as it shows without a GPU: what is set, what is refused, a CPU is let be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.ranks import losses, tiny_config, train
from trainer.config import Config
from trainer.errors import EXIT_FINISHED, UserError

SETTINGS = """
import os, torch
from trainer.model.attention_backend import preferring
from trainer.runtime.determinism import make_deterministic
print(make_deterministic(torch.device("cuda", 0)).partition(":")[0])
print(os.environ["CUBLAS_WORKSPACE_CONFIG"], torch.are_deterministic_algorithms_enabled())
print(torch.is_deterministic_algorithms_warn_only_enabled(), torch.utils.deterministic.fill_uninitialized_memory)
print(torch._inductor.config.deterministic)
with preferring("flash", torch.device("cpu")):
    cuda = torch.backends.cuda
    print(cuda.flash_sdp_enabled(), cuda.math_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled())
"""


def test_on_a_gpu_all_that_makes_the_bits_of_a_start_is_settled() -> None:
    """In a process of its own, which nothing else is computed in; none of it needs the GPU."""
    result = subprocess.run([sys.executable, "-c", SETTINGS], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == [
        "deterministic",
        ":4096:8 True",
        "False False",
        "True",
        "True True False False",
    ]


def test_on_a_cpu_nothing_changes(workspace: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert train(tiny_config(workspace, tmp_path / "usual")) == EXIT_FINISHED
    assert "deterministic" not in capfd.readouterr().out
    config = tiny_config(workspace, tmp_path / "run", train={"steps": 20, "precision": "fp32", "deterministic": True})
    assert train(config) == EXIT_FINISHED
    assert "deterministic: nothing to do on a CPU" in capfd.readouterr().out
    assert losses(tmp_path / "run") == losses(tmp_path / "usual")
    assert not torch.are_deterministic_algorithms_enabled()


def config_with(workspace: Path, folder: Path, backend: str) -> Config:
    base = tiny_config(workspace, folder)
    model = {"overrides": base.model.overrides, "attention_backend": backend}
    return tiny_config(workspace, folder, model=model, train={"steps": 1, "deterministic": True})


@pytest.mark.parametrize("backend", ["cudnn", "efficient"])
def test_attention_that_is_not_deterministic_is_refused(backend: str, workspace: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"not {backend}, which adds up in an order of its own"):
        config_with(workspace, tmp_path, backend)
    for other in ("auto", "flash", "math"):
        assert config_with(workspace, tmp_path, other).train.deterministic
