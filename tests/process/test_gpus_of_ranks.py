"""Gpu A1: each rank has a GPU of its own, or all are told so; CUDA is faked where its answer is what is looked at."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.ranks import run_ranks, tiny_config
from tools.demo import rank_count
from trainer.config import Config
from trainer.errors import EXIT_USER_MISTAKE
from trainer.runtime import distributed
from trainer.runtime.distributed import RankDevice, device_problem


def places(*devices: str, node: str = "n1", visible: int = 2) -> list[RankDevice]:
    return [RankDevice(node, device, visible) for device in devices]


def test_ranks_with_a_gpu_each_or_on_cpus_are_in_order() -> None:
    assert device_problem(places("GPU-a", "GPU-b")) is None
    assert device_problem(places("GPU-a", visible=1) + places("GPU-b", visible=1)) is None, "each sees its own"
    assert device_problem(places("GPU-a") + places("GPU-a", node="n2")) is None
    assert device_problem(places("", "", "", visible=0)) is None
    shared = [replace(place, may_share=True) for place in places("GPU-a", "GPU-a", visible=1)]
    assert device_problem(shared) is None, "as NCCL_MULTI_RANK_GPU_ENABLE=1 asks for"
    assert device_problem([replace(place, may_share=True) for place in places("GPU-a", "")]) is not None


@pytest.mark.parametrize(
    ("found", "said", "count"),
    [
        (places("GPU-a", "GPU-a", visible=1), "Rank 1 has the GPU of rank 0: n1 has 2 ranks and 1 GPU for them.", 1),
        (places("GPU-a", "GPU-b", ""), "Rank 2 has no GPU: n1 has 3 ranks and 2 GPUs for them.", 2),
        (
            places("GPU-a", "GPU-b") + places("GPU-c", "GPU-c", node="n2", visible=1),
            "Rank 3 has the GPU of rank 2: n2 has 2 ranks and 1 GPU for them.",
            1,
        ),
    ],
)
def test_a_rank_without_a_gpu_of_its_own_is_named_with_the_remedy(
    found: list[RankDevice], said: str, count: int
) -> None:
    error = device_problem(found)
    assert error is not None and error.problem == said
    assert f"one rank a GPU, here {count}." in error.remedy and 'CUDA_VISIBLE_DEVICES=""' in error.remedy


def test_what_torch_reads_on_gpus_is_set_where_the_user_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gpu S11, S13."""
    environ = {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync", "TORCH_FR_BUFFER_SIZE": "7"}
    monkeypatch.setattr(os, "environ", environ)
    distributed._set_defaults(Path("/runs/one/logs"))
    assert "PYTORCH_ALLOC_CONF" not in environ, "the user has set it by its older name"
    assert environ["TORCH_FR_BUFFER_SIZE"] == "7"
    assert environ["TORCH_FR_DUMP_TEMP_FILE"] == "/runs/one/logs/nccl-trace-rank-"
    del environ["PYTORCH_CUDA_ALLOC_CONF"]
    distributed._set_defaults(None)
    assert environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


def train_on_one_gpu(config: Config) -> int:
    """Runs on each rank: both would compute on the same GPU, if there were one."""
    from trainer.train import run

    distributed._own_place = lambda _device: RankDevice("n1", "GPU-a", 1)  # type: ignore[assignment]
    return run(config)


def test_two_ranks_on_one_gpu_are_refused_on_both_before_anything_is_written(
    workspace: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(workspace, tmp_path / "run")
    assert run_ranks(train_on_one_gpu, 2, config) == [EXIT_USER_MISTAKE] * 2
    assert capfd.readouterr().out.count("Rank 1 has the GPU of rank 0: n1 has 2 ranks and 1 GPU for them.") == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("gpus", "ranks"), [(0, 2), (1, 1), (2, 2), (8, 2)])
def test_the_demo_starts_no_more_ranks_than_there_are_gpus(
    gpus: int, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert rank_count() == ranks
