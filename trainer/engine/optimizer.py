"""The optimizer of a run; DeepSpeed shares out its state."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from trainer.config import OptimizerConfig
from trainer.engine.muon import Muon
from trainer.engine.partitions import ONE_MOMENT
from trainer.engine.stable_adamw import StableAdamW


def build_optimizer(
    model: torch.nn.Module,
    settings: OptimizerConfig,
    updates: Mapping[str, float] | None = None,
    matrices: Collection[str] = (),
) -> torch.optim.Optimizer:
    """Build it with the usual groups: biases and norm weights are not decayed, nor what has no gradient here.

    Those are the parameters of one dimension, XLNet's biases, which have two, and its segments and mask, which are not
    given to it.

    AdamW is fused, as torch offers it on CUDA and CPU; under ZeRO it runs over flat partitions either way. A partition
    has one count of updates, by which AdamW corrects the bias of its moments (arXiv:1412.6980, section 3), so that
    parameters which were frozen for a time have groups of their own. So have the matrices of Muon.

    Args:
        updates: that each parameter has had so far; of one that is not named none.
        matrices: names of the parameters that Muon updates, if the optimizer is Muon (`trainer.model.hidden_matrices`).
    """
    counts, is_muon = updates or {}, settings.name == "muon"
    groups: dict[tuple[float, bool, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_decayed = parameter.ndim >= 2 and not name.endswith(("_bias", ".seg_embed", ".mask_emb"))
            key = (-counts.get(name, 0.0), not (is_muon and name in matrices), not is_decayed)
            groups.setdefault(key, []).append(parameter)
    of_groups: list[dict[str, Any]] = []
    for key in sorted(groups):
        _, is_adamws, is_not_decayed = key
        decay = 0.0 if is_not_decayed else settings.weight_decay
        of_matrices = {} if is_adamws else {ONE_MOMENT: True, "momentum": settings.momentum}
        of_groups.append({"params": groups[key], "weight_decay": decay, **of_matrices})
    defaults: dict[str, Any] = {"lr": settings.lr, "betas": settings.betas, "eps": settings.eps}
    if is_muon:
        return Muon(of_groups, defaults)
    if settings.name == "stable_adamw":
        return StableAdamW(of_groups, defaults)
    return torch.optim.AdamW(of_groups, **defaults, fused=True)
