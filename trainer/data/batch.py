"""What an objective makes of blocks, and what computes on it: micro-batches, and the network that takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, NotRequired, TypedDict

import torch


class Documents(NamedTuple):
    """The documents of B blocks of S tokens, for attention within them.

    Attributes:
        positions: int64 [B, S], the distance of each token from the start of its document.
        cu_seqlens: int32 [n + 1], where documents begin in the flattened B·S, and B·S to the end.
    """

    positions: torch.Tensor
    cu_seqlens: torch.Tensor


Network = Callable[[torch.Tensor, torch.Tensor, Documents | None], torch.Tensor]
"""(input_ids [B, S], prediction_index [B·k], documents) → logits [B·k, vocabulary]."""


class Batch(TypedDict):
    """One micro-batch of B blocks of S tokens with k predictions each; int64.

    Attributes:
        input_ids: [B, S], masked.
        prediction_index: [B·k], flat positions into B·S.
        labels: [B·k], original ids at these positions, or IGNORED_LABEL.
        sources: [B], number of the source of each block; only in a run that mixes several.
        documents: only in a run with attention within documents.
    """

    input_ids: torch.Tensor
    prediction_index: torch.Tensor
    labels: torch.Tensor
    sources: NotRequired[torch.Tensor]
    documents: NotRequired[Documents]
