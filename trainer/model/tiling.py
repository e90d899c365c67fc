"""The weights of a narrower model laid over a wider one like tiles, from the centre outwards.

ModernBERT-large began so with the weights of the base model, after Phi (Warner et al., arXiv:2412.13663, appendix A.2;
the rule is that of `init_model_from_pretrained` and `tile_weights_from_middle` in AnswerDotAI/ModernBERT). One thing is
added: what a weight reads from several copies of a unit is divided among them (Net2WiderNet, Chen et al.,
arXiv:1511.05641), and unevenly. Divided, so that a copy adds nothing to a sum, and a model of a multiple of the width
gives the logits of the narrower one; unevenly, because copies that are read alike have equal gradients and never part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from trainer.model.hf_config import head_width_of
from trainer.model.stock import tied_to


@dataclass(frozen=True)
class _Kind:
    """What has to be known of a type of model beside its shapes.

    Attributes:
        last_norm: the module whose output meets the table of tokens, which is the decoder as well.
        parts: the end of a weight's name → how many projections lie in it, one after the other.
    """

    last_norm: str
    parts: Mapping[str, int]


_BERT = _Kind("cls.predictions.transform.LayerNorm", {})
_ROBERTA = _Kind("lm_head.layer_norm", {})
TILED: Mapping[str, _Kind] = {
    "bert": _BERT,
    "camembert": _ROBERTA,
    "distilbert": _Kind("vocab_layer_norm", {}),
    "electra": _Kind("generator_predictions.LayerNorm", {}),
    "ernie": _BERT,
    "modernbert": _Kind("head.norm", {"attn.Wqkv": 3, "mlp.Wi": 2}),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
}
"""`config.model_type` → how models of the type are tiled; others are refused."""


def spread(small: int, large: int, unit: int = 1) -> torch.Tensor:
    """Say which place of the narrower each of the wider one takes, the narrower whole in the middle.

    Args:
        unit: places that stay together, such as those of a head; both sizes are multiples of it.

    Returns:
        int64 [large], of [0, small).
    """
    before = (large // unit - small // unit) // 2 * unit
    return (torch.arange(large) - before) % small


def shares(places: torch.Tensor, rows: int) -> torch.Tensor:
    """Divide what each row reads of a unit among the unit's copies, in other parts in each row.

    Before they are made to add up to 1 they lie between 1/2 and 3/2, spread by Weyl's sequence in two directions.

    Args:
        places: int64 [large], as of `spread`.

    Returns:
        fp64 [rows, large]; 1 where there is one copy.
    """
    row, column = torch.arange(rows, dtype=torch.float64)[:, None], torch.arange(len(places), dtype=torch.float64)
    uneven = 0.5 + (row * math.sqrt(2) + column * math.sqrt(3)) % 1.0
    total = torch.zeros(rows, int(places.max()) + 1, dtype=torch.float64).index_add_(1, places, uneven)
    return uneven / total[:, places]


def layers_for(small: int, large: int) -> list[int]:
    """Say which layer of the shallower each of the deeper one takes: that which is as far up, by its middle.

    ModernBERT takes round(i · small / large), which leaves the range at twice the depth and counts a layer from its
    lower end. From the middle on each layer is taken equally often, where large is a multiple of small.
    """
    return [(2 * number + 1) * small // (2 * large) for number in range(large)]


class Tiling:
    """How the weights of a model are made of those of a narrower one of the same type.

    Args:
        source: the config of the narrower one.
    """

    def __init__(self, model: PreTrainedModel, source: PretrainedConfig) -> None:
        kind, self._modules = TILED[model.config.model_type], dict(model.named_modules())
        self._parts, self._hidden = kind.parts, (source.hidden_size, model.config.hidden_size)
        self._head_width = head_width_of(model.config)
        self._first = tied_to(model)
        tables = {id(parameter): name for name, parameter in model.named_parameters()}
        self._table = tables[id(model.get_input_embeddings().weight)]
        is_decoder = sum(first == self._table for first in self._first.values()) > 1
        self._meeting = kind.last_norm if is_decoder else None

    def fits(self, name: str, small: Sequence[int], large: Sequence[int]) -> bool:
        """Tell whether a weight of a shape can be made of a small one: nothing shrinks, and a table keeps its rows."""
        fixed = 1 if isinstance(self._owner(name), nn.Embedding) else 0
        pairs = list(zip(small, large, strict=False))
        return (
            len(small) == len(large)
            and all(one == other for one, other in pairs[:fixed])
            and all(one <= other for one, other in pairs)
        )

    def make(self, name: str, weight: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """Make a weight of a shape of that which fills it in the narrower model, fp32 and with its rows."""
        for axis, (small, large) in enumerate(zip(weight.shape, shape, strict=True)):
            parts = self._parts_of(name) if axis == 0 else 1
            places = self._places(small // parts, large // parts)
            weight = torch.cat([part.index_select(axis, places) for part in weight.chunk(parts, axis)], axis)
            if self._adds_up(name, axis):
                rows = weight.view(-1, len(places))  # the axis is the last
                weight = (rows * shares(places, len(rows))).float().view(weight.shape)
        return weight

    def _places(self, small: int, large: int) -> torch.Tensor:
        return spread(small, large, self._head_width if (small, large) == self._hidden else 1)

    def _adds_up(self, name: str, axis: int) -> bool:
        """Tell whether a sum is taken over this axis of a weight, or over what the weight scales."""
        if isinstance(self._owner(name), nn.Linear):
            return axis == 1 and self._first[name] != self._table
        return name.rpartition(".")[0] == self._meeting

    def _owner(self, name: str) -> nn.Module | None:
        return self._modules.get(name.rpartition(".")[0])

    def _parts_of(self, name: str) -> int:
        return next((count for end, count in self._parts.items() if name.rpartition(".")[0].endswith(end)), 1)
