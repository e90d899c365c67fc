"""Muon: updates of the layers' matrices are made orthogonal, all other weights are AdamW's.

Sources: K. Jordan et al. (2024) for momentum and iteration, Moonlight (arXiv:2502.16982) for decay and scale. With
momentum b, learning rate r, decay d and a matrix W of [n, m]

    M_t = b M_{t-1} + (1 - b) G_t        U_t = orthogonalize(b M_t + (1 - b) G_t)
    W_t = W_{t-1} - r (d W_{t-1} + 0.2 sqrt(max(n, m)) U_t)

so that one learning rate does for both kinds of weights. The state of a matrix is M, under AdamW's name of a first
moment. M and W are updated where they lie; for U whole matrices are needed (`matrix_exchange`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from trainer.engine.flat_optimizer import FlatOptimizer, Flats, RankPlace, kernels, update_by_adamw
from trainer.engine.matrix_exchange import MatrixExchange
from trainer.engine.newton_schulz import orthogonalize, step_scale
from trainer.engine.partitions import ONE_MOMENT
from trainer.engine.state_layout import FlatLayout
from trainer.engine.state_size import ELEMENTS_AT_ONCE


class Muon(FlatOptimizer):
    """Groups of AdamW; those that ONE_MOMENT marks hold matrices, and have a `momentum`."""

    def __init__(self, groups: Iterable[dict[str, Any]], defaults: dict[str, Any]) -> None:
        super().__init__(groups, defaults)
        self._exchanges: dict[int, MatrixExchange] = {}

    def lay_out(self, layouts: Mapping[torch.Tensor, FlatLayout], place: RankPlace) -> None:
        super().lay_out(layouts, place)
        self._exchanges.clear()

    def update(self, flats: Flats, group: Mapping[str, Any]) -> None:
        """Update a group of matrices by Muon, another by AdamW."""
        if not group.get(ONE_MOMENT):
            update_by_adamw(flats, group)
            return
        updates, momentum, rate = flats.gradients, group["momentum"], group["lr"]
        kernels._foreach_lerp_(flats.moments["exp_avg"], updates, 1 - momentum)
        kernels._foreach_lerp_(updates, flats.moments["exp_avg"], momentum)  # Nesterov's
        self._make_orthogonal(updates, flats.layout)
        kernels._foreach_mul_(flats.weights, 1 - rate * group["weight_decay"])
        kernels._foreach_add_(flats.weights, updates, alpha=-rate)

    def _make_orthogonal(self, updates: Sequence[torch.Tensor], layout: FlatLayout) -> None:
        """Replace updates, flat, by orthogonal ones of AdamW's RMS; a collective where matrices lie on several ranks.

        Matrices of one shape are stacked, tall ones lying on their side, which changes nothing.
        """
        exchange = self._exchange(layout)
        matrices = {number: _lying(matrix) for number, matrix in exchange.gather(updates).items()}
        results = {}
        for numbers in _stacks({number: tuple(matrix.shape) for number, matrix in matrices.items()}):
            found = orthogonalize(torch.stack([matrices.pop(number) for number in numbers]))
            for number, matrix in zip(numbers, found, strict=True):
                n, m = layout.shapes[number]
                results[number] = matrix.mT if n > m else matrix
        exchange.give_back(results, updates)
        pieces = layout.own(self.place.rank)
        scales = [step_scale(layout.shapes[piece.parameter]) for piece in pieces]
        if pieces:  # of few matrices and many ranks a rank may have padding alone
            kernels._foreach_mul_([piece.of(updates) for piece in pieces], scales)

    def _exchange(self, layout: FlatLayout) -> MatrixExchange:
        if id(layout) not in self._exchanges:
            rank, ranks, device = self.place.rank, self.place.ranks, self.place.device
            # bf16 on GPUs, as the authors iterate; a CPU computes as fast in fp32.
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
            self._exchanges[id(layout)] = MatrixExchange(layout, rank, ranks, dtype, device)
        return self._exchanges[id(layout)]


def _lying(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix


def _stacks(shapes: Mapping[int, tuple[int, ...]]) -> Iterator[list[int]]:
    """Divide matrices into stacks of one shape and up to ELEMENTS_AT_ONCE, or one matrix that has more.

    Args:
        shapes: by number.
    """
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for number, shape in shapes.items():
        by_shape.setdefault(shape, []).append(number)
    for shape, numbers in by_shape.items():
        most = max(1, ELEMENTS_AT_ONCE // math.prod(shape))
        for first in range(0, len(numbers), most):
            yield numbers[first : first + most]
