"""Causal attention over whole blocks, without a look at any value: what the known causal classes are given for it.

Left to themselves, transformers' classes look in each forward pass whether positions begin anew within a row, for which
the host waits for the device, and under torch.compile they make a mask of S × S. A block of the stream is one sequence:
sdpa's own causal way does, and where there are local layers one mask for all blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from trainer.model.model_code import is_stock
from trainer.model.prediction_head import projection_of

FULL, LOCAL = "full_attention", "sliding_attention"
# In transformers' registry of attention functions, and in that of masks not: so a class makes none.
_WITHOUT_MASK = "causal_sdpa"


def has_kinds_of_layers(config: PretrainedConfig) -> bool:
    """Tell whether a class takes one mask for its full and one for its local layers, by their names."""
    if not is_stock(type(config)):
        return False
    return bool(getattr(config, "layer_types", None)) or config.model_type == "modernbert"


def local_window(config: PretrainedConfig) -> int | None:
    """Find the window of a model's local layers, None where it has none."""
    if not has_kinds_of_layers(config):
        return None
    kinds = getattr(config, "layer_types", None) or ()
    return config.sliding_window if LOCAL in kinds or config.model_type == "modernbert" else None


def use_causal_sdpa(model: PreTrainedModel) -> None:
    """Let a known causal class rely on sdpa's causal way; other classes, and those with kinds of layers, stay."""
    if projection_of(model) is not None and not has_kinds_of_layers(model.config):
        model.set_attn_implementation(_WITHOUT_MASK)


@contextmanager
def positions_run_through() -> Iterator[None]:
    """Spare transformers' look at whether positions begin anew within a row, where there are no values to look at."""
    look = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = look


def causal_masks(model: PreTrainedModel, seq_len: int, device: torch.device) -> dict[str, Any]:
    """Make the argument `attention_mask` of a known causal class with kinds of layers; nothing for others."""
    if projection_of(model) is None or not has_kinds_of_layers(model.config):
        return {}
    window = local_window(model.config)
    place = torch.arange(seq_len, device=device)
    distance = place[:, None] - place
    local = None if window is None else ((distance >= 0) & (distance < window))[None, None]
    return {"attention_mask": {FULL: None, LOCAL: local}}


AttentionInterface.register(_WITHOUT_MASK, sdpa_attention_forward)
