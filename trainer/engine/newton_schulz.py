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
    result, left = matrices / norms.clamp(min=_SMALLEST_NORM), ITERATIONS
    n, m = matrices.shape[1:]
    while left:
        together = 2 if left > 1 and matrices.dtype == torch.float32 and 2 * m > 3 * n else 1
        result = _twice(result) if together == 2 else torch.baddbmm(result, _polynomial(_gram(result)), result, beta=_A)
        left -= together
    return result


def _twice(matrices: torch.Tensor) -> torch.Tensor:
    """Iterate twice with fewer FLOPs, if m > 1.5 n: the second Gram matrix follows from the first.

    With A the Gram matrix of X and P = aI + bA + cA^2, which commutes with it, that of PX is PAP. In fp32 nothing is
    lost: what rounding adds to small eigenvalues of A hardly changes P, and X itself is multiplied, so that its small
    singular values keep their digits. More than two steps would let the rounding grow.
    """
    gram = _gram(matrices)
    first = _polynomial(gram)
    first.diagonal(dim1=-2, dim2=-1).add_(_A)
    second = _polynomial(first @ gram @ first)
    second.diagonal(dim1=-2, dim2=-1).add_(_A)
    return second @ first @ matrices


def _gram(matrices: torch.Tensor) -> torch.Tensor:
    return matrices @ matrices.mT


def _polynomial(gram: torch.Tensor) -> torch.Tensor:
    """Compute what a step adds to a times the matrix, as a factor of it: bA + cA^2."""
    return torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C)


def step_scale(shape: Sequence[int]) -> float:
    """Compute what an orthogonal update is multiplied with, so that its RMS is that of AdamW's updates, about 0.2.

    Moonlight's (arXiv:2502.16982, equation 4): a matrix [n, m] of singular values 1 has an RMS of 1 / sqrt(max(n, m)).
    """
    return 0.2 * math.sqrt(max(shape))


def iteration_flops(shape: Sequence[int]) -> int:
    """Count the FLOPs that all iterations on a matrix take, an add and a multiply as two.

    Each multiplies [n, m] by [m, n], [n, n] by itself, and [n, n] by [n, m], with n <= m. In fp32 matrices of m > 1.5 n
    take fewer (`_twice`).
    """
    n, m = min(shape), max(shape)
    return ITERATIONS * (4 * n * n * m + 2 * n**3)
