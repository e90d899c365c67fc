"""The optimizer of a run, as torch has it; DeepSpeed shares out its state."""

from __future__ import annotations

import torch

from trainer.config import OptimizerConfig


def build_optimizer(model: torch.nn.Module, settings: OptimizerConfig) -> torch.optim.AdamW:
    """Build AdamW with the usual groups: biases and norm weights (one-dimensional parameters) are not decayed.

    Fused, as torch offers it on CUDA and CPU; under ZeRO it runs over flat partitions either way.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)
