"""Gpu A8: train.deterministic as far as it shows without a GPU: what is set, what is refused, a CPU is let be."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.commands import call_forked
from tests.ranks import losses, tiny_config, train
from trainer.config import Config
from trainer.errors import EXIT_FINISHED, UserError
from trainer.model.attention_backend import preferring
from trainer.runtime.determinism import make_deterministic


def settings_of_a_start() -> dict[str, Any]:
    """What is settled, by name, in this process."""
    found: dict[str, Any] = {"note": make_deterministic(torch.device("cuda", 0)).partition(":")[0]}
    found["workspace"] = os.environ["CUBLAS_WORKSPACE_CONFIG"]
    found["algorithms"] = torch.are_deterministic_algorithms_enabled()
    found["warns only"] = torch.is_deterministic_algorithms_warn_only_enabled()
    found["fills"] = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    found["inductor"] = torch._inductor.config.deterministic
    with preferring("flash", torch.device("cpu")):
        kinds = ("flash", "math", "mem_efficient", "cudnn")
        found["kernels"] = {kind: getattr(torch.backends.cuda, f"{kind}_sdp_enabled")() for kind in kinds}
    return found


def test_on_a_gpu_all_that_makes_the_bits_of_a_start_is_settled() -> None:
    """In a process of its own, which nothing else is computed in; none of it needs the GPU."""
    assert call_forked(settings_of_a_start) == {
        "note": "deterministic",
        "workspace": ":4096:8",
        "algorithms": True,
        "warns only": False,
        "fills": False,
        "inductor": True,
        "kernels": {"flash": True, "math": True, "mem_efficient": False, "cudnn": False},
    }


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
