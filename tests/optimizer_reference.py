"""AdamW, StableAdamW and Muon as their papers write them, a parameter at a time, in fp64, to compare with."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch

from trainer.config import OptimizerConfig


class ReferenceOptimizer:
    """One process, whole parameters.

    Attributes:
        weights: by name, fp64; updated by `step`.
        moments: by name and kind.
        smallest_rate: that a parameter was updated by so far.
    """

    def __init__(
        self, settings: OptimizerConfig, weights: Mapping[str, torch.Tensor], matrices: Collection[str]
    ) -> None:
        self.settings, self.matrices = settings, matrices
        self.weights = {name: weight.detach().double().clone() for name, weight in weights.items()}
        self.moments: dict[str, dict[str, torch.Tensor]] = {name: {} for name in weights}
        self.steps, self.smallest_rate = 0, settings.lr

    def step(self, gradients: Mapping[str, torch.Tensor]) -> None:
        """Update all weights, with the gradients clipped as DeepSpeed clips them."""
        self.steps += 1
        norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients.values()))
        scale = max(1.0, (norm + 1e-6) / self.settings.clip)
        for name, gradient in gradients.items():
            decay = self.settings.weight_decay if self.weights[name].ndim > 1 else 0.0
            by_muon = self.settings.name == "muon" and name in self.matrices
            update, rate = (self._muon if by_muon else self._adamw)(name, gradient.double() / scale)
            self.weights[name] -= rate * decay * self.weights[name] + rate * update

    def _adamw(self, name: str, gradient: torch.Tensor) -> tuple[torch.Tensor, float]:
        (beta1, beta2), eps = self.settings.betas, self.settings.eps
        first = self._average(name, "exp_avg", gradient, beta1) / (1 - beta1**self.steps)
        second = self._average(name, "exp_avg_sq", gradient.square(), beta2) / (1 - beta2**self.steps)
        rate = self.settings.lr
        if self.settings.name == "stable_adamw":
            ratio = gradient.square() / second.clamp(min=eps**2)
            rate /= max(1.0, math.sqrt(float(ratio.mean())))
            self.smallest_rate = min(self.smallest_rate, rate)
        return first / (second.sqrt() + eps), rate

    def _muon(self, name: str, gradient: torch.Tensor) -> tuple[torch.Tensor, float]:
        momentum = self.settings.momentum
        average = self._average(name, "exp_avg", gradient, momentum)
        update = orthogonal(momentum * average + (1 - momentum) * gradient)
        return 0.2 * math.sqrt(max(update.shape)) * update, self.settings.lr

    def _average(self, name: str, kind: str, value: torch.Tensor, decay: float) -> torch.Tensor:
        before = self.moments[name].get(kind, torch.zeros_like(value))
        self.moments[name][kind] = decay * before + (1 - decay) * value
        return self.moments[name][kind]


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Iterate on the singular values, which is what the iteration on the matrix does."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.square().sum().sqrt()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left @ values.diag() @ right
