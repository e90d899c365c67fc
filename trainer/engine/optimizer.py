"""The optimizer of a run, as torch has it; DeepSpeed shares out its state."""

from __future__ import annotations

import torch

from trainer.config import OptimizerConfig


def build_optimizer(model: torch.nn.Module, settings: OptimizerConfig) -> torch.optim.AdamW:
    """Build AdamW with the usual groups: biases and norm weights are not decayed, nor what has no gradient here.

    Those are the parameters of one dimension, XLNet's biases, which have two, and its segments and mask, which are not
    given to it.

    Fused, as torch offers it on CUDA and CPU; under ZeRO it runs over flat partitions either way.
    """
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_decayed = parameter.ndim >= 2 and not name.endswith(("_bias", ".seg_embed", ".mask_emb"))
            (decayed if is_decayed else others).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)
