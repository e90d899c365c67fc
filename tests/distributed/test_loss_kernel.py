"""The cross-entropy in Triton, by Triton's interpreter: the kernel that runs on a GPU, step by step on CPU."""

from __future__ import annotations

import importlib
import math
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as functional

from tests.commands import assert_one_card, call_forked, maskwright
from tests.ranks import losses, run_ranks, tiny_config, write_config
from trainer.config import Config
from trainer.data.blocks import IGNORED_LABEL
from trainer.engine import loss_kernel
from trainer.errors import EXIT_FINISHED, EXIT_USER_MISTAKE

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="Triton is made for Linux on x86-64 only"
)


def interpret_triton() -> Any:
    """Have this process run DeepSpeed's kernels by the interpreter, on CPU tensors; returns DeepSpeed's module.

    DeepSpeed makes its kernels where Triton has a GPU, which the interpreter does not need, and uses them for tensors
    of a GPU.
    """
    os.environ["TRITON_INTERPRET"] = "1"  # as tests/conftest.py has it, but for ranks that were told otherwise
    from triton.backends import backends

    for backend in backends.values():
        backend.driver.is_active = staticmethod(lambda: True)
    for name in ("deepspeed.ops.triton_ops._triton", "deepspeed.runtime.chunked_cross_entropy"):
        module = importlib.import_module(name)
        importlib.reload(module)
    module._resolve_backend = lambda backend, _logits: backend
    return module


def computed(
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], logits: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses, and the gradient of their sum with a weight for each row."""
    leaf = logits.clone().requires_grad_()
    result = function(leaf, labels)
    weights = torch.linspace(0.5, 1.5, len(labels))
    (result * weights).nan_to_num(posinf=0.0).sum().backward()
    assert leaf.grad is not None and leaf.grad.dtype == logits.dtype
    return result.detach(), leaf.grad.float()


def of_torch(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits.float(), labels, reduction="none", ignore_index=IGNORED_LABEL)


def compare_with_torch(rows: int, classes: int, dtype: torch.dtype) -> None:
    interpret_triton()
    torch.manual_seed(classes)
    logits = (torch.randn(rows, classes) * 4).to(dtype)
    logits[:, 5] = -math.inf
    labels = torch.randint(6, classes, (rows,))
    labels[1::3] = IGNORED_LABEL
    ours, our_gradient = computed(loss_kernel.triton_cross_entropies, logits, labels)
    theirs, their_gradient = computed(of_torch, logits, labels)
    assert ours.dtype == torch.float32 and ours[labels == IGNORED_LABEL].eq(0).all()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=2e-6)
    exact = {torch.float32: (1e-5, 1e-7), torch.bfloat16: (8e-3, 1e-6), torch.float16: (1e-3, 1e-6)}
    rtol, atol = exact[dtype]
    torch.testing.assert_close(our_gradient, their_gradient, rtol=rtol, atol=atol)
    assert our_gradient[:, 5].eq(0).all() and our_gradient[labels == IGNORED_LABEL].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "classes"), [(13, 7), (4, 4096), (5, 4097), (4, 50_265)])
def test_losses_and_gradients_are_those_of_torch(rows: int, classes: int, dtype: torch.dtype) -> None:
    call_forked(compare_with_torch, rows, classes, dtype)


def losses_of_extremes() -> list[float]:
    interpret_triton()
    logits = torch.tensor([[0.0, 200.0, -3.0], [0.0, -math.inf, 1.0], [math.nan, 0.0, 0.0]])
    return loss_kernel.triton_cross_entropies(logits, torch.tensor([0, 1, 1])).tolist()


def test_a_label_that_is_far_off_has_a_finite_loss_and_an_impossible_one_an_infinite() -> None:
    far, impossible, undefined = call_forked(losses_of_extremes)
    assert far == pytest.approx(200.0) and impossible == math.inf and math.isnan(undefined)


def trained(config: Config, interpreted_ranks: tuple[int, ...]) -> int:
    """Runs on each rank."""
    if int(os.environ["RANK"]) in interpreted_ranks:
        interpret_triton()
    else:
        os.environ["TRITON_INTERPRET"] = "0"
    from trainer.train import run

    return run(config, "auto", False)


def test_training_with_it_has_the_losses_of_torch(
    workspace: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(workspace, tmp_path / "torch")
    assert run_ranks(trained, 2, config, ()) == [EXIT_FINISHED] * 2
    assert "cross-entropy" not in capfd.readouterr().out, "on CPU there is no choice"

    model = config.model.model_copy(update={"kernels": "triton"})
    place = config.run.model_copy(update={"dir": str(tmp_path / "triton")})
    asked = config.model_copy(update={"model": model, "run": place})
    assert run_ranks(trained, 2, asked, (0, 1)) == [EXIT_FINISHED] * 2
    assert capfd.readouterr().out.count("cross-entropy: the Triton kernel, which agrees with torch's here") == 1
    assert losses(tmp_path / "triton") == pytest.approx(losses(tmp_path / "torch"), abs=1e-5)
    assert len(losses(tmp_path / "triton")) == 20

    place = config.run.model_copy(update={"dir": str(tmp_path / "half")})
    halved = asked.model_copy(update={"run": place})
    assert run_ranks(trained, 2, halved, (0,)) == [EXIT_USER_MISTAKE] * 2, "it must be usable on all ranks"
    assert "The Triton kernel of the cross-entropy cannot be used: it needs a GPU." in capfd.readouterr().out


def test_on_cpu_it_is_refused_with_the_remedy(workspace: Path, tmp_path: Path) -> None:
    config = write_config(tiny_config(workspace, tmp_path / "run"), tmp_path / "config.yaml")
    refused = maskwright("train", config, "model.kernels=triton", TRITON_INTERPRET="0")
    words = ("cannot be used: it needs a GPU", "model.kernels=triton", "model.kernels=auto")
    assert_one_card(refused, EXIT_USER_MISTAKE, *words)
    unknown = maskwright("validate", config, "model.kernels=liger")
    assert_one_card(unknown, EXIT_USER_MISTAKE, "'model.kernels'", "auto", "torch", "triton", "liger")


def obstacles() -> list[str | None]:
    kernel = interpret_triton()
    found = [loss_kernel.obstacle(300, torch.bfloat16, CPU)]
    right = kernel.chunked_cross_entropy
    kernel.chunked_cross_entropy = lambda *args, **options: right(*args, **options) * 1.001
    found.append(loss_kernel.obstacle(300, torch.bfloat16, CPU))

    def fail(*_args: Any, **_options: Any) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

    kernel.chunked_cross_entropy = fail
    found.append(loss_kernel.obstacle(300, torch.bfloat16, CPU))
    sys.modules["deepspeed.runtime.chunked_cross_entropy"] = None  # type: ignore[assignment]  # as if it were not there
    found.append(loss_kernel.obstacle(300, torch.bfloat16, CPU))
    return found


def test_one_that_differs_or_fails_is_not_used_and_the_reason_is_one_line() -> None:
    right, wrong, failing, missing = call_forked(obstacles)
    assert right is None
    assert wrong == "it gives other results than torch"
    assert failing == "RuntimeError: Failed to find C compiler. Please specify via CC environment variable."
    assert missing is not None and missing.startswith("ModuleNotFoundError: ")
