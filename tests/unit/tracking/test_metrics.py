from __future__ import annotations

import pytest
import torch

from trainer.tracking.metrics import peak_memory_gib


def test_on_a_gpu_the_gaps_of_the_allocator_are_counted_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gpu S13; CUDA is faked where its answer is what is looked at."""
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _device: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _device: 4 * 2**30)
    assert peak_memory_gib(torch.device("cuda")) == (3.0, 4.0)


def test_on_a_cpu_it_is_the_process() -> None:
    peak, reserved = peak_memory_gib(torch.device("cpu"))
    assert peak == reserved > 0.05, "torch alone takes more"
