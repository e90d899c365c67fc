"""Attention within documents, for stock classes: what they are given so that no token sees another document.

A packed block holds parts of several documents. Here each of them is a sequence of its own: positions restart, and
attention ends at its borders. Class, weights and names stay stock, and without `Documents` the model does what its
class always does.

Two ways give the same result. The block mask is a boolean mask for sdpa, made once a batch; sdpa computes all S × S
products and drops those between documents. Variable-length flash attention (`torch.nn.attention.varlen`, for NVIDIA
GPUs in half precision) computes none of them.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from trainer.model.causal_attention import FULL, LOCAL, has_kinds_of_layers, local_window
from trainer.model.classes import CAUSAL, is_in
from trainer.model.hf_config import attention_dropout_of, head_width_of, position_offset
from trainer.model.model_code import is_stock

if TYPE_CHECKING:
    from trainer.data.batch import Documents

_VARLEN = "varlen_documents"  # in transformers' registry of attention functions


class DocumentAttention:
    """The forward arguments that keep the attention of one model within documents.

    Args:
        model: of a class for which `hf_config.keeps_documents` holds, in the precision it will train in. Where
            variable-length attention can be used, the model is switched to it.
        device: where it will run.

    Attributes:
        note: a line for the user: which of the two ways is used, and why.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        self._offset = position_offset(model)
        self._causal = is_in(model.config, CAUSAL)
        # A class whose positions are distances alone takes none.
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self._has_kinds, self._window = has_kinds_of_layers(model.config), local_window(model.config)
        obstacle = _own_attention(model) or _obstacle_to_varlen(model.config, next(model.parameters()).dtype, device)
        self._varlen = obstacle is None
        way = f"a block mask ({obstacle})" if obstacle else "variable-length flash attention"
        self.note = f"attention: by {way}"
        if self._varlen:
            model.set_attn_implementation(_VARLEN)

    def inputs(self, documents: Documents) -> dict[str, Any]:
        """Make the arguments of a stock masked-LM class for a batch with these documents, on the batch's device."""
        arguments: dict[str, Any] = {}
        if self._takes_positions:
            arguments["position_ids"] = documents.positions + self._offset
        if self._varlen:
            seq_len = documents.positions.shape[1]
            arguments |= {f"cu_seq_lens_{side}": documents.cu_seqlens for side in ("q", "k")}
            arguments |= {f"max_length_{side}": seq_len for side in ("q", "k")}
            masks = None, None
        else:
            masks = block_masks(documents.positions, self._window, self._causal)
        kinds = dict(zip((FULL, LOCAL), masks, strict=True))
        arguments["attention_mask"] = kinds if self._has_kinds else masks[0]
        return arguments


def block_masks(
    positions: torch.Tensor, window: int | None, causal: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Make boolean masks for sdpa, True where a token may look at another.

    Args:
        positions: int64 [B, S], the distance of each token from the start of its document.
        window: how far local attention sees to either side, or how many tokens a causal one sees, itself included; None
            where there is none.
        causal: whether no token may look at a later one.

    Returns:
        (full, local), each [B, 1, S, S]; local is None without a window.
    """
    document = (positions == 0).cumsum(dim=1)
    same = (document[:, :, None] == document[:, None, :]).unsqueeze(1)
    place = torch.arange(positions.shape[1], device=positions.device)
    distance = place[:, None] - place
    if causal:
        same = same & (distance >= 0)
    if window is None:
        return same, None
    return same, same & (distance < window if causal else distance.abs() <= window)


def _own_attention(model: PreTrainedModel) -> str | None:
    """Say that a model computes its attention itself; None where it leaves that to the registry of transformers."""
    if is_stock(type(model)) or model._supports_attention_backend:
        return None
    return f"{type(model).__name__} computes its attention itself"


def _obstacle_to_varlen(config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> str | None:
    """Say why variable-length flash attention cannot be used, or return None when it can."""
    head_width, dropout = head_width_of(config), attention_dropout_of(config)
    if device.type != "cuda":
        return "no GPU"
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0):
        return "flash attention needs an NVIDIA GPU of compute capability 8.0 or higher"
    if dtype not in (torch.bfloat16, torch.float16):
        return "flash attention has no fp32"
    if head_width % 8 or head_width > 256:
        return f"flash attention needs heads of a multiple of 8 up to 256, not of {head_width}"
    if dropout:
        return f"variable-length flash attention has no dropout, and that of attention is {dropout:g}"
    return None


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention within documents, in the form that transformers' registry asks for; sdpa without documents.

    Args:
        query, key, value: [B, heads, S, width], bf16 or fp16; of keys and values there may be fewer heads.
        sliding_window: as local layers give it: one more than what they see to either side, or to the left.
        cu_seq_lens_q: int32 [n + 1], where documents begin in the flattened B·S.
        max_length_q: no document is longer.

    Returns:
        [B, S, heads, width], and None for the weights.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **others)
    assert dropout == 0.0 and max_length_q is not None
    reach = -1 if sliding_window is None else sliding_window - 1
    window = (reach, 0 if getattr(module, "is_causal", True) else reach)
    if (groups := query.shape[1] // key.shape[1]) > 1:
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    q, k, v = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
    lengths, longest = cu_seq_lens_q, max_length_q
    output = varlen_attn(q, k, v, lengths, lengths, longest, longest, scale=scaling, window_size=window)
    assert isinstance(output, torch.Tensor)
    return output.unflatten(0, (query.shape[0], query.shape[2])), None


AttentionInterface.register(_VARLEN, varlen_attention)
AttentionMaskInterface.register(_VARLEN, sdpa_mask)  # for forward passes without documents
