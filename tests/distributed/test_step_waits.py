"""A step does not make the host wait for the device, but once: whether it is to be skipped must be known."""

from __future__ import annotations

import traceback
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ranks import run_ranks
from tests.tiny_bench import write_tiny_model
from tools.bench.step import VARIANTS
from tools.bench.step_ours import EngineStepper
from tools.bench.step_work import StepWork, make_config, make_work_samples, training_batches
from trainer.data.batch import Batch

WORK = StepWork(micro_size=2, seq_len=32, steps=2, warmup_steps=0)


class HostReads(TorchDispatchMode):
    """Where a tensor's value is read by the host: `.item()`, `float()`, `bool()`, `.tolist()` of one element."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.places.append("".join(traceback.format_stack(limit=12)))
        return func(*args, **(kwargs or {}))


def test_the_host_reads_are_found() -> None:
    with HostReads() as reads:
        float(torch.ones(()) + 1)
    assert len(reads.places) == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_reads_one_value_from_the_device(precision: str, tmp_path: Path) -> None:
    assert run_ranks(_count_reads, 1, replace(WORK, model=write_tiny_model(tmp_path), precision=precision)) == [0]


def _count_reads(work: StepWork) -> int:
    stepper, batch = _after_a_step(work)
    with HostReads() as reads:
        _step(stepper, batch)
    assert len(reads.places) == 1, "\n\n".join(reads.places)
    assert "is_invalid_grad_norm" in reads.places[0]
    return 0


def _after_a_step(work: StepWork) -> tuple[EngineStepper, Batch]:
    """The engine when its first step, which makes the optimizer's state, is done, and a batch on the device."""
    variant = VARIANTS["ours"]
    config = make_config(work, variant)
    objective = make_work_samples(work, config)
    stepper = EngineStepper(work, config)
    first, second, *_ = (batch.to(stepper.device) for batch in training_batches(work, variant, objective))
    _step(stepper, first)
    return stepper, second


def _step(stepper: EngineStepper, batch: Batch) -> None:
    stepper.backward(stepper.forward(batch))
    stepper.optimize()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: its waits cannot be counted")
def test_a_step_waits_once_on_cuda(tmp_path: Path) -> None:
    assert run_ranks(_count_waits, 1, replace(WORK, model=write_tiny_model(tmp_path), precision="bf16")) == [0]


def _count_waits(work: StepWork) -> int:
    stepper, batch = _after_a_step(work)
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _step(stepper, batch)
    torch.cuda.set_sync_debug_mode("default")
    waits = [str(warning.message) for warning in caught if "synchronizing" in str(warning.message)]
    assert len(waits) == 1, waits
    return 0
