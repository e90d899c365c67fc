"""The divergence from a teacher's distribution over a large vocabulary, with one matrix kept for the backward pass."""

from __future__ import annotations

from typing import Any

import torch


def soft_cross_entropies(logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
    """Compute T² · KL(p_T ‖ q_T) of each row in nats: [n] in fp32, q_T of `logits`, p_T of `targets`.

    With T² gradients have the size that they have at T = 1 (Hinton et al., arXiv:1503.02531, section 2). In fp32
    whatever the dtype, as `trainer.objectives.cross_entropy.cross_entropies`; kept is q_T − p_T, over which the
    gradient is written.

    Args:
        logits: [n, V].
        targets: [n, C], C ≤ V, of the first C classes; the others have probability 0. No gradient reaches them.
    """
    return _SoftCrossEntropies.apply(logits, targets, temperature)  # type: ignore[return-value]  # is not annotated


class _SoftCrossEntropies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
        known = targets.shape[1]
        expected, log_sums_of_targets = _softmax(targets, temperature)
        # Σ p · (log p − log q), the logarithms as logits less their sums: log p alone would be −∞ where p underflows.
        differences = _copied(targets).sub_(logits[:, :known]).div_(temperature)
        means = differences.mul_(expected).sum(dim=1)
        del differences
        probabilities, log_sums = _softmax(logits, temperature)
        probabilities[:, :known] -= expected
        ctx.save_for_backward(probabilities)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        return (means - log_sums_of_targets + log_sums).mul_(temperature**2)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (difference,) = ctx.saved_tensors
        # Written over what was kept, so there is no second time: autograd refuses it.
        return difference.mul_(ctx.temperature * gradients[0].unsqueeze(1)).to(ctx.dtype), None, None


def _softmax(logits: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute softmax(logits / T) and the logarithm of its denominator: fp32 [n, V] and [n]."""
    scaled = _copied(logits).div_(temperature)
    largest = scaled.max(dim=1, keepdim=True).values
    sums = scaled.sub_(largest).exp_().sum(dim=1, keepdim=True)
    return scaled.div_(sums), (largest + sums.log()).squeeze(1)


def _copied(logits: torch.Tensor) -> torch.Tensor:
    """Copy to fp32, so that what is computed of them needs no second matrix."""
    return logits.to(torch.float32, copy=True)
