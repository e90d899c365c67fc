"""The vocabulary projection at the predicted positions only.

A masked-LM class computes logits for all S positions of a block, though the loss reads 15 % of them: with a small
model that is most of the work and of the memory. Here the head of the stock class receives just the predicted rows
of the encoder's output. Loss and gradients stay those of the full head, because the head works on each position
alone. The class, its weights and their names are untouched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

import torch
from torch import nn
from transformers import PreTrainedModel

HEAD_MODULES: Mapping[str, str] = MappingProxyType(
    {
        "albert": "predictions",
        "bert": "cls",
        "camembert": "lm_head",
        "distilbert": "vocab_transform",
        "ernie": "cls",
        "esm": "lm_head",
        "eurobert": "lm_head",
        "modernbert": "head",
        "roberta": "lm_head",
        "xlm-roberta": "lm_head",
    }
)
"""`config.model_type` → the submodule of its masked-LM class that is first to receive the encoder's output."""


class MaskedPositions:
    """Which positions the head of one model computes; made by `install`.

    Usage::

        with positions.select(prediction_index):
            output = model(input_ids=input_ids, **constants)
        logits = positions.logits(output.logits, prediction_index)

    Outside `select` the model does what its stock class does.

    Attributes:
        in_head: True when the head itself is restricted; False for a class whose head is not known here, which
            computes all logits.
    """

    def __init__(self, in_head: bool) -> None:
        self.in_head = in_head
        self._index: torch.Tensor | None = None

    @contextmanager
    def select(self, prediction_index: torch.Tensor) -> Iterator[None]:
        """Restrict forward passes inside the `with` to `prediction_index`: int64 [N], flat positions into B·S."""
        self._index = prediction_index
        try:
            yield
        finally:
            self._index = None

    def logits(self, logits: torch.Tensor, prediction_index: torch.Tensor) -> torch.Tensor:
        """Return the logits [N, V] at the selected positions, from what a forward pass inside `select` returned."""
        return logits if self.in_head else _rows(logits, prediction_index)

    def keep_selected(self, head: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        """Cut encoder output [B, S, H] to its selected rows [N, H]; the forward pre-hook of the head."""
        if self._index is None:
            return None
        hidden, *others = args
        return (_rows(hidden, self._index), *others)


def install(model: PreTrainedModel) -> MaskedPositions:
    """Let the head of a stock masked-LM model be restricted to predicted positions.

    A forward pre-hook, not a new forward: it composes with DeepSpeed's hooks that gather a ZeRO-3 partition, and
    torch.compile traces through it in one graph. Install before the model is compiled.
    """
    name = HEAD_MODULES.get(model.config.model_type)
    positions = MaskedPositions(in_head=name is not None)
    if name is not None:
        model.get_submodule(name).register_forward_pre_hook(positions.keep_selected)
    return positions


def _rows(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return states.flatten(0, -2).index_select(0, index)
