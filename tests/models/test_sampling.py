"""Tokens are drawn from logits by given numbers: as often as they are likely, and each row as it is alone."""

from __future__ import annotations

import pytest
import torch

from trainer.model.sampling import sample_tokens


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(1, 1000, generator=generator)
    draws = 200_000
    uniform = torch.rand(draws, generator=generator)
    found = torch.cat([sample_tokens(logits.expand(len(part), -1), part) for part in uniform.split(5000)])
    expected = logits[0].double().softmax(dim=0) * draws
    often = expected > 20
    counts = torch.bincount(found, minlength=1000).double()
    chi = (((counts - expected) ** 2 / expected)[often]).sum() / (int(often.sum()) - 1)
    assert 0.8 < chi < 1.25, "χ² for each degree of freedom"
    assert counts[~often].sum() == pytest.approx(float(expected[~often].sum()), rel=0.1)


@pytest.mark.parametrize("size", [3, 256, 257, 1000])
def test_the_ends_of_the_unit_interval_are_tokens(size: int) -> None:
    logits = torch.randn(4, size, generator=torch.Generator().manual_seed(1))
    last = sample_tokens(logits, torch.full((4,), 1.0 - 2.0**-24))
    assert sample_tokens(logits, torch.zeros(4)).tolist() == [0] * 4
    assert (last < size).all() and (last >= size - 3).all()
    sure = torch.full((4, size), -40.0)
    sure[range(4), torch.arange(4) % size] = 40.0
    assert sample_tokens(sure, torch.tensor([0.0, 0.3, 0.9, 0.999])).tolist() == [n % size for n in range(4)]


def test_a_row_is_drawn_as_it_is_alone() -> None:
    logits = 3 * torch.randn(64, 700, generator=torch.Generator().manual_seed(2))
    uniform = torch.rand(64, generator=torch.Generator().manual_seed(3))
    together = sample_tokens(logits, uniform)
    for rows in (1, 3, 16):
        parts = zip(logits.split(rows), uniform.split(rows), strict=True)
        assert torch.equal(torch.cat([sample_tokens(*part) for part in parts]), together)
