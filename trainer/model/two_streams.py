"""What XLNet is given to predict tokens in an order (Yang et al., arXiv:1906.08237, section 2.3).

Its content stream sees tokens themselves, its query stream, which predicts, only their positions and what comes before
them. Logits come out at the predicted positions alone, so no hook restricts its head.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from trainer.errors import UserError


def predicting_in_order(ranks: torch.Tensor, prediction_index: torch.Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """Make the arguments of XLNet's forward; its logits are then [B, k, V].

    Who is predicted at rank r sees what is not predicted and the ranks below r, and its content stream itself as well,
    which the class adds. What is not predicted sees no predicted token.

    Args:
        ranks: int64 [B, S], −1 where nothing is predicted.
        prediction_index: int64 [B·k], flat positions into B·S, k a block. The logits at one that is not predicted mean
            nothing, whatever it is: its query is left out, because the class adds up the queries of one position.
        dtype: of the model's weights.
    """
    rows, seq_len = ranks.shape
    places = prediction_index.view(rows, -1) - seq_len * torch.arange(rows, device=ranks.device)[:, None]
    targets = places[:, :, None] == torch.arange(seq_len, device=ranks.device)
    targets &= ranks.gather(1, places)[:, :, None] >= 0
    hidden = (ranks[:, None, :] >= 0) & (ranks[:, :, None] <= ranks[:, None, :])
    return {"perm_mask": hidden.to(dtype), "target_mapping": targets.to(dtype), "use_mems": False}


def keep_positions_in_dtype(model: PreTrainedModel) -> None:
    """Let XLNet's sines and cosines be of the weights' dtype; transformers multiplies fp32 ones by weights in bf16."""
    encoder: Any = model.base_model
    if model.config.model_type == "xlnet":
        in_fp32 = encoder.relative_positional_encoding
        encoder.relative_positional_encoding = lambda *args, **kwargs: in_fp32(*args, **kwargs).to(encoder.dtype)


def refuse_one_sided(config: PretrainedConfig, where: str) -> None:
    """Refuse an XLNet that hides tokens for other reasons than the order of prediction.

    Raises:
        UserError: for attention to the left alone, and for blocks that go in pairs, forward and backward.
    """
    for name, needed in (("attn_type", "bi"), ("bi_data", False)):
        if (value := getattr(config, name, needed)) != needed:
            raise UserError(
                f"{type(config).__name__} with {name}={value} does not see both sides of a block.",
                where=where,
                remedy=f"Set model.overrides.{name}={str(needed).lower()}.",
            )
