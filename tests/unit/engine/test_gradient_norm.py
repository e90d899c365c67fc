"""The norm of gradients: exact to fp32 where torch's own is not, whatever the shapes and cuts."""

from __future__ import annotations

import math

import pytest
import torch

from trainer.engine.grad_norm import sum_of_squares


@pytest.fixture(scope="module")
def gradient() -> torch.Tensor:
    """As large as an embedding, with values of very different sizes."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(3001, 2003, generator=generator)
    return values * torch.rand(3001, 2003, generator=generator) ** 8


def test_a_large_tensor_and_any_cut_of_it(gradient: torch.Tensor) -> None:
    exact = float(gradient.double().square().sum())
    assert float(torch.linalg.vector_norm(gradient)) ** 2 != pytest.approx(exact, rel=1e-5), "or it is not needed"
    assert float(sum_of_squares([gradient])) == pytest.approx(exact, rel=1e-6)
    flat = gradient.flatten()
    for cuts in ([1], [1024, 8192], [5, 2_000_001, 4_000_000]):
        assert float(sum_of_squares(flat.tensor_split(cuts))) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_values_whose_rounding_adds_up(dtype: torch.dtype) -> None:
    values = torch.full((3_000_001,), 0.1, dtype=dtype)
    assert float(sum_of_squares([values])) == pytest.approx(float(values.double().square().sum()), rel=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_empty_and_transposed_ones(gradient: torch.Tensor, dtype: torch.dtype) -> None:
    tensors = [gradient[:70, :70].t(), gradient[0, :3], gradient[:0], gradient[:3, :2000]]
    tensors = [tensor.to(dtype) for tensor in tensors]
    exact = math.fsum(float(tensor.double().square().sum()) for tensor in tensors)
    assert float(sum_of_squares(tensors)) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 5000, 9999])
def test_one_bad_element_is_seen(bad: float, place: int) -> None:
    values = torch.ones(10_000)
    values[place] = bad
    assert not bool(sum_of_squares([torch.ones(7), values]).isfinite())
