"""Dropout on the CPU, where torch's own draws take as long as a third of the matrix products.

torch draws a number for each element by itself, one after the other. Here four elements share 64 random bits of the
same generator, 16 each, which is six times as fast (docs/performance.md). A probability is rounded to 1/65,536, and
what is kept is scaled by the rounded one. Models stay of their class; on other devices nothing is changed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_ATTENTION = "host_dropout"  # in transformers' registry of attention functions
_STEPS = 1 << 16


def use_host_dropout(model: PreTrainedModel) -> None:
    """Give a model on the CPU this dropout in the place of torch's, in its attention where that is sdpa as well."""
    for name, module in [*model.named_modules()]:
        if type(module) is nn.Dropout:
            model.set_submodule(name, HostDropout(module.p).train(module.training))
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(_ATTENTION)


def seed_dropout(seed: int, device: torch.device) -> None:
    """Seed what draws dropout on a device, as torch.manual_seed does.

    That one also asks for devices that are not there, and formats a stack for each: 0.9 ms of the host a micro-batch.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)


class HostDropout(nn.Dropout):
    """nn.Dropout with the draws of this module."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0.0:
            return input
        kept, kept_share = draw_kept(input.shape, self.p, input.dtype)
        return input * kept.mul_(1.0 / kept_share)


def draw_kept(shape: torch.Size, probability: float, dtype: torch.dtype) -> tuple[torch.Tensor, float]:
    """Draw what is kept, by torch's default generator.

    Args:
        probability: of being dropped.

    Returns:
        0 and 1 of the shape and dtype (a product with them is several times as fast as a fill by a mask of bool), and
        the share of ones on average.
    """
    steps = round(probability * _STEPS)
    count = math.prod(shape)
    bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = torch.empty(count, dtype=dtype)
    torch.ge(bits.view(torch.int16)[:count], steps - _STEPS // 2, out=kept)
    return kept.view(shape), 1.0 - steps / _STEPS


def attention_with_dropout(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention in the form that transformers' registry asks for; sdpa where nothing is dropped.

    Args:
        query, key, value: [B, heads, S, width].
        attention_mask: bool, True where a token may look at another, or to be added to the scores (LayoutLM's);
            broadcast to [B, heads, S, S].

    Returns:
        [B, S, heads, width], and None for the weights.
    """
    if dropout == 0.0 or key.shape[1] != query.shape[1]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **others)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query * scale) @ key.transpose(-1, -2)
    if attention_mask is not None and attention_mask.dtype is torch.bool:
        scores = scores.masked_fill(~attention_mask, -math.inf)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1)
    kept, kept_share = draw_kept(weights.shape, dropout, weights.dtype)
    output = (weights * kept) @ (value * (1.0 / kept_share))
    return output.transpose(1, 2), None


AttentionInterface.register(_ATTENTION, attention_with_dropout)
AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
