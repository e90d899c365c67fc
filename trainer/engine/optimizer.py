"""The optimizer of a run, as torch has it; DeepSpeed shares out its state."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from trainer.config import OptimizerConfig


def build_optimizer(
    model: torch.nn.Module, settings: OptimizerConfig, updates: Mapping[str, float] | None = None
) -> torch.optim.AdamW:
    """Build AdamW with the usual groups: biases and norm weights are not decayed, nor what has no gradient here.

    Those are the parameters of one dimension, XLNet's biases, which have two, and its segments and mask, which are not
    given to it.

    Fused, as torch offers it on CUDA and CPU; under ZeRO it runs over flat partitions either way. A partition has one
    count of updates, by which AdamW corrects the bias of its moments (arXiv:1412.6980, section 3), so that parameters
    which were frozen for a time have groups of their own.

    Args:
        updates: that each parameter has had so far; of one that is not named none.
    """
    counts = updates or {}
    groups: dict[tuple[float, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_decayed = parameter.ndim >= 2 and not name.endswith(("_bias", ".seg_embed", ".mask_emb"))
            groups.setdefault((-counts.get(name, 0.0), not is_decayed), []).append(parameter)
    of_groups = [
        {"params": groups[key], "weight_decay": 0.0 if key[1] else settings.weight_decay} for key in sorted(groups)
    ]
    return torch.optim.AdamW(of_groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)
