"""Orthogonalize matrices approximately by Newton-Schulz iterations: the heart of Muon.

Source: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024), whose quintic iteration and
coefficients these are. They do not converge: singular values end between about 0.7 and 1.2, which trains as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

_A, _B, _C = 3.4445, -4.7750, 2.0315
_SMALLEST_NORM = 1e-7
ITERATIONS = 5


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Bring the singular values of matrices near 1, in their own dtype; a matrix of nought stays one.

    Args:
        matrices: [k, n, m] with n <= m, which makes the products small.

    Returns:
        [k, n, m], a new tensor.
    """
    # Of rows first: on the CPU torch sums up the squares of a whole matrix with an error that grows with it.
    norms = torch.linalg.vector_norm(torch.linalg.vector_norm(matrices, dim=-1, keepdim=True), dim=-2, keepdim=True)
    result = matrices / norms.clamp(min=_SMALLEST_NORM)
    for _ in range(ITERATIONS):
        gram = result @ result.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C)
        result = torch.baddbmm(result, polynomial, result, beta=_A)
    return result


def step_scale(shape: Sequence[int]) -> float:
    """Compute what an orthogonal update is multiplied with, so that its RMS is that of AdamW's updates, about 0.2.

    Moonlight's (arXiv:2502.16982, equation 4): a matrix [n, m] of singular values 1 has an RMS of 1 / sqrt(max(n, m)).
    """
    return 0.2 * math.sqrt(max(shape))


def iteration_flops(shape: Sequence[int]) -> int:
    """Count the FLOPs that all iterations on a matrix take, an add and a multiply as two.

    Each multiplies [n, m] by [m, n], [n, n] by itself, and [n, n] by [n, m], with n <= m.
    """
    n, m = min(shape), max(shape)
    return ITERATIONS * (4 * n * n * m + 2 * n**3)
