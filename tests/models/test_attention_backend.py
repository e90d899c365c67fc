"""The choice among torch's attention kernels, with the kernels that a CPU has: flash and math."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as functional

from trainer.model.attention_backend import (
    BACKENDS,
    AttentionShape,
    agree,
    choose_backend,
    measure_backends,
    preferring,
    usable,
)

CPU = torch.device("cpu")
SHAPE = AttentionShape(batch=2, heads=2, seq_len=256, width=32, dropout=0.0, precision="fp32")


def kernels_of_a_call() -> set[str]:
    query = torch.randn(1, 2, 16, 8, requires_grad=True)
    with torch.profiler.profile() as profile:
        functional.scaled_dot_product_attention(query, query, query)
    return {event.key for event in profile.key_averages() if "_scaled_dot_product" in event.key}


def test_what_the_device_cannot_do_is_left_out_and_the_random_state_is_kept() -> None:
    state = torch.random.get_rng_state()
    times = measure_backends(SHAPE, CPU, list(BACKENDS))
    assert list(times) == ["flash", "math"], "a CPU has no others"
    assert all(value > 0 for value in times.values())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_flash_has_no_dropout_on_a_cpu() -> None:
    with_dropout = AttentionShape(batch=1, heads=2, seq_len=64, width=16, dropout=0.1, precision="fp32")
    state = torch.random.get_rng_state()
    assert list(measure_backends(with_dropout, CPU, ["flash", "math"])) == ["math"]
    assert torch.equal(torch.random.get_rng_state(), state), "its draws are not the run's"


def test_half_precision_is_measured_in_half_precision() -> None:
    shape = AttentionShape(batch=1, heads=2, seq_len=64, width=16, dropout=0.0, precision="bf16")
    with torch.profiler.profile(record_shapes=True) as profile:
        assert "flash" in measure_backends(shape, CPU, ["flash"])
    calls = [event for event in profile.events() if event.name.endswith("flash_attention_for_cpu")]
    assert calls and calls[0].input_shapes[0] == [1, 2, 64, 16]


def test_a_kernel_that_computes_something_else_is_not_used() -> None:
    reference = [torch.randn(50, 8), torch.randn(50, 8)]
    close = [tensor + 0.02 * tensor.abs().max() for tensor in reference]
    assert agree([tensor.bfloat16() for tensor in close], reference, 0.03)
    assert not agree([close[0], close[1] + 0.1], reference, 0.03)
    assert not agree([close[0], torch.full_like(close[1], torch.nan)], reference, 0.03)
    wrong = AttentionShape(batch=1, heads=2, seq_len=64, width=16, dropout=0.0, precision="fp32")
    original, passes = functional.scaled_dot_product_attention, []

    def broken(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **others: Any) -> torch.Tensor:
        passes.append(torch.backends.cuda.math_sdp_enabled())
        return original(query, key, value, **others) * (1.0 if passes[-1] else 1.01)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "scaled_dot_product_attention", broken)
        assert usable(wrong, CPU, ["flash", "math"]) == ["math"]
    assert set(passes) == {True, False} and usable(wrong, CPU, ["flash", "math"]) == ["flash", "math"]


def test_running_out_of_memory_is_not_taken_for_a_kernel_that_is_not_there() -> None:
    def full(*_: Any, **__: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory (made by the test)")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "scaled_dot_product_attention", full)
        with pytest.raises(torch.OutOfMemoryError):
            usable(SHAPE, CPU, ["flash"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: there is one order only")
@pytest.mark.parametrize("backend", ["flash", "cudnn", "efficient"])
def test_on_a_gpu_a_new_process_uses_the_preferred_kernel_at_its_first_call(backend: str) -> None:
    program = f"""
import torch
from trainer.model.attention_backend import preferring
with preferring({backend!r}, torch.device("cuda")), torch.profiler.profile() as profile:
    query = torch.randn(2, 4, 512, 64, device="cuda", dtype=torch.bfloat16)
    torch.nn.functional.scaled_dot_product_attention(query, query, query)
print([event.key for event in profile.key_averages() if "_scaled_dot_product" in event.key])
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert f"_scaled_dot_product_{backend}_attention" in result.stdout


@pytest.mark.parametrize(
    ("milliseconds", "chosen"),
    [
        ({"flash": 2.0, "cudnn": 1.0, "efficient": 3.0}, "cudnn"),
        ({"flash": 1.0, "cudnn": 0.98}, "flash"),  # within the noise
        ({"cudnn": 1.0, "efficient": 0.5}, "efficient"),
        ({"efficient": 1.0}, "efficient"),
        ({}, None),
    ],
)
def test_the_fastest_unless_it_hardly_is(milliseconds: dict[str, float], chosen: str | None) -> None:
    assert choose_backend(milliseconds) == chosen


def test_the_preferred_kernel_is_used_and_another_one_where_it_cannot_be() -> None:
    assert kernels_of_a_call() == {"aten::_scaled_dot_product_flash_attention_for_cpu"}
    with preferring("math", CPU):
        assert kernels_of_a_call() == {"aten::_scaled_dot_product_attention_math"}
    with preferring("cudnn", CPU):  # which a CPU does not have
        assert kernels_of_a_call() == {"aten::_scaled_dot_product_flash_attention_for_cpu"}
    with preferring(None, CPU):
        assert kernels_of_a_call() == {"aten::_scaled_dot_product_flash_attention_for_cpu"}
    assert kernels_of_a_call() == {"aten::_scaled_dot_product_flash_attention_for_cpu"}, "what held before"
