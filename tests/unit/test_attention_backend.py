"""The choice among torch's attention kernels, with the kernels that a CPU has: flash and math."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as functional

from trainer.attention_backend import BACKENDS, AttentionShape, choose, measure, preferring

CPU = torch.device("cpu")
SHAPE = AttentionShape(batch=2, heads=2, seq_len=256, width=32, dropout=0.0, precision="fp32")


def kernels_of_a_call() -> set[str]:
    query = torch.randn(1, 2, 16, 8, requires_grad=True)
    with torch.profiler.profile() as profile:
        functional.scaled_dot_product_attention(query, query, query)
    return {event.key for event in profile.key_averages() if "_scaled_dot_product" in event.key}


def test_what_the_device_cannot_do_is_left_out_and_the_random_state_is_kept() -> None:
    state = torch.random.get_rng_state()
    times = measure(SHAPE, CPU, list(BACKENDS))
    assert list(times) == ["flash", "math"], "a CPU has no others"
    assert all(value > 0 for value in times.values())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_flash_has_no_dropout_on_a_cpu() -> None:
    with_dropout = AttentionShape(batch=1, heads=2, seq_len=64, width=16, dropout=0.1, precision="fp32")
    assert list(measure(with_dropout, CPU, ["flash", "math"])) == ["math"]


def test_half_precision_is_measured_in_half_precision() -> None:
    shape = AttentionShape(batch=1, heads=2, seq_len=64, width=16, dropout=0.0, precision="bf16")
    with torch.profiler.profile(record_shapes=True) as profile:
        assert "flash" in measure(shape, CPU, ["flash"])
    calls = [event for event in profile.events() if event.name.endswith("flash_attention_for_cpu")]
    assert calls and calls[0].input_shapes[0] == [1, 2, 64, 16]


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
    assert choose(milliseconds) == chosen


def test_the_preferred_kernel_is_used_and_another_one_where_it_cannot_be() -> None:
    assert kernels_of_a_call() == {"aten::_scaled_dot_product_flash_attention_for_cpu"}
    with preferring("math"):
        assert kernels_of_a_call() == {"aten::_scaled_dot_product_attention_math"}
    with preferring("cudnn"):  # which a CPU does not have
        assert kernels_of_a_call() == {"aten::_scaled_dot_product_flash_attention_for_cpu"}
    with preferring(None):
        assert kernels_of_a_call() == {"aten::_scaled_dot_product_flash_attention_for_cpu"}
    assert kernels_of_a_call() == {"aten::_scaled_dot_product_flash_attention_for_cpu"}, "what held before"
