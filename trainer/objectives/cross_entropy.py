"""Cross-entropy over a large vocabulary that holds one copy of the probabilities and writes the gradient over it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from trainer.data.blocks import IGNORED_LABEL

CrossEntropies = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(logits [n, V], labels [n]) → losses [n] in fp32, as `cross_entropies`."""


def cross_entropies(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Compute the cross-entropy of each row in nats, 0 where the label is IGNORED_LABEL; [n] in fp32.

    In fp32 whatever the dtype of the logits: bf16 would quantise a loss of 7.5 to steps of 1/32. torch's own keeps the
    logits in fp32, their log-softmax and its gradient; here there is one such matrix, which is the most that a
    step of a small model holds.

    Args:
        logits: [n, V].
        labels: int64 [n].
    """
    return _CrossEntropies.apply(logits, labels)  # type: ignore[return-value]  # apply is not annotated


class _CrossEntropies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        counted = labels != IGNORED_LABEL
        index = labels.where(counted, 0).unsqueeze(1)
        largest, place = logits.max(dim=1, keepdim=True)
        probabilities = torch.softmax(logits, dim=1, dtype=torch.float32)
        # By the largest probability, which is never so small that it becomes 0.
        log_sums = largest.float() - probabilities.gather(1, place).log()
        ctx.save_for_backward(probabilities, index, counted)  # so that a checkpoint computes them again
        ctx.dtype = logits.dtype
        return (log_sums - logits.gather(1, index).float()).squeeze(1).where(counted, 0.0)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        difference, index, counted = ctx.saved_tensors
        weights = gradients[0].where(counted, 0.0).unsqueeze(1)
        # Written over the probabilities, so there is no second time: autograd refuses it.
        difference.scatter_add_(1, index, torch.full_like(weights, -1.0))
        return difference.mul_(weights).to(ctx.dtype), None
