"""What `trainer.engine.zero_patches` puts in the place of DeepSpeed's own passes, by itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.engine.zero_patches import patch_zero_optimizer


class FromHost(TorchDispatchMode):
    """Collects the operations that copy a tensor of the host to a device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        from_host = any(isinstance(each, torch.Tensor) and each.device.type == "cpu" for each in args)
        if from_host and isinstance(result, torch.Tensor) and result.device.type == "cuda":
            self.found.append(str(func))
        return result


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_the_loss_scale_is_not_copied_from_the_host(clip: float) -> None:
    """Gpu A3: such a copy waits for all that the device has still to do."""
    zero = SimpleNamespace(clip_grad=clip, loss_scale=1024.0, partition_gradients=False, dtype=0)
    zero.gradient_accumulation_dtype = 1
    adamw = torch.optim.AdamW([torch.zeros(1)])
    patch_zero_optimizer(zero, adamw, ranks=2)
    with FakeTensorMode(), FromHost() as copies:
        zero.unscale_and_clip_grads([], torch.empty((), device="cuda"))
    assert copies.found == []
    assert vars(adamw)["grad_scale"].device.type == "cuda"
