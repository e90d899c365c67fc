"""Draws tokens from logits by numbers that are given: the same for the same row, whatever rows are beside it."""

from __future__ import annotations

import torch
from torch.nn import functional

_CHUNK = 256


@torch.no_grad()
def sample_tokens(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Draw one token a row from the softmax of its logits, by inverting the distribution function.

    First the chunk of 256 tokens in which the number falls, then the token in it: prefix sums are of V / 256 and of 256
    terms, and in fp32 few roundings add up. They are made by doubling (Hillis & Steele 1986), which is elementwise: a
    row's bits depend on no other row, kernel or reduced precision of matrix products, and torch.cumsum adds in no fixed
    order on CUDA.

    Args:
        logits: [n, V], finite.
        uniform: fp32 [n], in [0, 1).

    Returns:
        int64 [n], in [0, V).
    """
    rows, vocabulary_size = logits.shape
    chunks = -(-vocabulary_size // _CHUNK)
    padded = functional.pad(logits, (0, chunks * _CHUNK - vocabulary_size), value=float("-inf"))
    probabilities = torch.softmax(padded, dim=1, dtype=torch.float32).view(rows, chunks, _CHUNK)
    of_chunks = _prefix_sums(probabilities.sum(dim=2))
    target = uniform.unsqueeze(1) * of_chunks[:, -1:]
    chunk = (of_chunks <= target).sum(dim=1, keepdim=True).clamp(max=chunks - 1)
    before = functional.pad(of_chunks, (1, 0)).gather(1, chunk)
    within = probabilities.gather(1, chunk.unsqueeze(2).expand(-1, -1, _CHUNK)).squeeze(1)
    place = (_prefix_sums(within) <= target - before).sum(dim=1, keepdim=True).clamp(max=_CHUNK - 1)
    return (chunk * _CHUNK + place).squeeze(1).clamp(max=vocabulary_size - 1)


def _prefix_sums(terms: torch.Tensor) -> torch.Tensor:
    """Sum each row [n, m] up to each of its places."""
    step = 1
    while step < terms.shape[1]:
        terms = terms + functional.pad(terms, (step, 0))[:, :-step]
        step *= 2
    return terms
