"""A step on a device that is not there: what would copy from or to the host, or wait for the device, shows without one.

torch's CPU build refuses autograd for tensors of CUDA, so the device is one of torch's kind for devices made elsewhere.
Nothing is computed: `FakeTensorMode` knows shapes and devices alone, and refuses what would have to look at a value.
DeepSpeed's engine is not in it; what maskwright puts in a step around it is.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from tests.commands import call_forked
from tests.tiny_models import ARCHITECTURES, CAUSAL_ARCHITECTURES, SEQ_LEN, tiny_model, vocabulary
from trainer.config import ObjectiveConfig
from trainer.data.batch import Batch
from trainer.data.blocks import DOCUMENT_STARTS, Blocks
from trainer.engine.grad_norm import sum_of_squares
from trainer.model.forward import Forward
from trainer.model.hf_config import DOCUMENT_ATTENTION_MODELS
from trainer.model.model_code import SHIPPED
from trainer.objectives.language_model import LanguageModelLoss
from trainer.objectives.mlm import TERM, MaskedSamples
from trainer.objectives.objective import loss_sums, tally

GPU = "gpu"
DOCUMENT_START = 7


class HostTraffic(TorchDispatchMode):
    """Collects operations that have tensors of the host and of the device, inputs and outputs together.

    A number of the host, a tensor without dimensions, goes along with a kernel's arguments.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [each for each in (*args, result) if isinstance(each, torch.Tensor)]
        moved = isinstance(result, torch.Tensor) and len({tensor.device.type for tensor in tensors}) > 1
        if moved and any(tensor.dim() for tensor in tensors if tensor.device.type == "cpu"):
            self.found.append(str(func))
        return result


def on_device(model: nn.Module) -> nn.Module:
    """The model with weights and buffers of the device, tied as before."""
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                if id(weight) not in moved:
                    moved[id(weight)] = nn.Parameter(torch.empty(weight.shape, device=GPU))
                module._parameters[name] = moved[id(weight)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=GPU)
    return model


def there(value: Any, device: torch.device) -> Any:
    """The value with its tensors on the device."""
    if isinstance(value, dict):
        return {name: there(each, device) for name, each in value.items()}
    return torch.empty(value.shape, dtype=value.dtype, device=device) if isinstance(value, torch.Tensor) else value


def traffic_of(work: Callable[[], None]) -> list[str]:
    with HostTraffic() as traffic:
        work()
    return traffic.found


def traffic_of_a_step(model_type: str, in_documents: bool) -> dict[str, list[str]]:
    """Runs in a process of its own: the device's name stays with a process."""
    _setup_privateuseone_for_python_backend(GPU)
    device = torch.device(GPU)
    with tempfile.TemporaryDirectory() as folder:
        model: Any = tiny_model(Path(folder), model_type)
    objective = MaskedSamples(ObjectiveConfig(), vocabulary(), SEQ_LEN)
    starts = np.zeros((3, SEQ_LEN - 2), np.bool_)
    starts[:, DOCUMENT_START] = True
    blocks = np.full((3, SEQ_LEN - 2), 50)
    batch = objective.make_batch(
        Blocks(blocks, {DOCUMENT_STARTS: starts} if in_documents else {}), np.arange(3, dtype=np.uint64), 0
    )
    forward = Forward(model, torch.device("cpu"), in_documents)
    constants = forward.constants(SEQ_LEN)
    with FakeTensorMode() as fake:
        on_device(model)
        forward._constants[SEQ_LEN] = {name: there(value, device) for name, value in constants.items()}
        moved = batch._each(fake.from_tensor).to(device)
        return _traffic_of_parts(model, forward, moved)


def _traffic_of_parts(model: nn.Module, network: Forward, batch: Batch) -> dict[str, list[str]]:
    criterion = LanguageModelLoss(TERM)
    losses: list[torch.Tensor] = []
    norms: list[torch.Tensor] = []
    weights = list(model.parameters())
    adamw = torch.optim.AdamW(weights, fused=True)

    def update() -> None:
        adamw.grad_scale = norms[0].float().clamp(min=1.0)  # type: ignore[attr-defined]
        adamw.step()

    parts: dict[str, Callable[[], None]] = {
        "forward": lambda: losses.append(loss_sums(criterion, network, batch, 1)),
        "backward": lambda: losses[0].sum().backward(),
        "norm": lambda: norms.append(sum_of_squares([each.grad for each in weights if each.grad is not None]).sqrt()),
        "update": update,
        "evaluation": lambda: losses.append(tally(criterion, network, batch)),
    }
    found = {name: traffic_of(part) for name, part in parts.items()}
    assert all(each.device.type == GPU for each in (*losses, *norms)), "the work was done there"
    assert any(each.grad is not None for each in weights)
    return found


COPIES_ITSELF = {"deberta-v2"}  # its class moves a number to the device in each pass, for the buckets of distances
PLAIN = sorted({*ARCHITECTURES, *CAUSAL_ARCHITECTURES} - COPIES_ITSELF)
CASES = [*((name, False) for name in PLAIN), *((name, True) for name in sorted({*DOCUMENT_ATTENTION_MODELS, *SHIPPED}))]


@pytest.mark.parametrize(("model_type", "in_documents"), CASES)
def test_no_part_of_a_step_copies_from_or_to_the_host_or_looks_at_a_value(model_type: str, in_documents: bool) -> None:
    found = call_forked(traffic_of_a_step, model_type, in_documents)
    assert list(found) == ["forward", "backward", "norm", "update", "evaluation"]
    assert not any(found.values()), found


def what_would_be_found() -> list[list[str]]:
    _setup_privateuseone_for_python_backend(GPU)
    with FakeTensorMode():
        there = torch.ones(3, device=GPU)
        copies = [
            traffic_of(lambda: there.cpu() is None),
            traffic_of(lambda: torch.zeros(3).to(GPU) is None),
            traffic_of(lambda: there.copy_(torch.zeros(3)) is None),
            traffic_of(lambda: (there * 2).sum() is None),
        ]
        with pytest.raises(DataDependentOutputException):
            float(there.sum())
    return copies


def test_such_copies_would_be_found() -> None:
    to_host, from_host, in_place, none = call_forked(what_would_be_found)
    assert to_host and from_host and in_place and not none
