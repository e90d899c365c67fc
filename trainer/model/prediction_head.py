"""The vocabulary projection where it is wanted, and no more of it in memory at once than is needed.

A masked-LM class computes logits for all S positions of a block, though the loss reads 15 % of them: with a small
model that is most of the work and of the memory. Here the head of the stock class receives just the predicted rows
of the encoder's output. Loss and gradients stay those of the full head, because the head works on each position
alone. The class, its weights and their names are untouched.

A causal class predicts every position. There the last matrix of the head is applied to some rows after the other, and
what is made of their logits is kept in their place: in training they are computed again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from trainer.data.batch import Score
from trainer.model.classes import is_detector
from trainer.model.model_code import is_stock

HEAD_MODULES: Mapping[str, str] = MappingProxyType(
    {
        "albert": "predictions",
        "bert": "cls",
        "camembert": "lm_head",
        "deberta-v2": "cls",
        "distilbert": "vocab_transform",
        "electra": "generator_predictions",
        "ernie": "cls",
        "esm": "lm_head",
        "eurobert": "lm_head",
        "gpt2": "lm_head",
        "gpt_neox": "lm_head",
        "llama": "lm_head",
        "megatron-bert": "cls",
        "modernbert": "head",
        "modernbert-decoder": "lm_head",
        "opt": "lm_head",
        "qwen3": "lm_head",
        "roberta": "lm_head",
        "xlm-roberta": "lm_head",
    }
)
"""`config.model_type` → the submodule of its masked or causal class that is first to receive the encoder's output."""
PROJECTIONS: Mapping[str, str] = MappingProxyType(
    {
        "gpt2": "lm_head",
        "gpt_neox": "lm_head",
        "llama": "lm_head",
        "modernbert-decoder": "decoder",
        "opt": "lm_head",
        "qwen3": "lm_head",
    }
)
"""`config.model_type` → the submodule whose output its causal class returns as logits, unchanged."""
LOGITS_AT_ONCE = 1 << 25  # 128 MiB in fp32; more of them gain no speed


class PredictionHead:
    """Which positions the head of one model computes, and what becomes of the logits; made by `install`.

    Usage::

        with head.select(prediction_index, score):
            output = model(input_ids=input_ids, **constants)
        logits = head.rows(output.logits, prediction_index)

    Outside `select` the model does what its stock class does.

    Attributes:
        in_head: True when the head itself is restricted; False for a class whose head is not known here, which
            computes all logits.
        scores: True when the model returns scores in the place of logits, if they are asked for.
        states: [B, S, H], the encoder's output, which the head is given; inside `select`, where they are to be kept.
    """

    def __init__(self, in_head: bool, scores: bool) -> None:
        self.in_head, self.scores = in_head, scores
        self._index: torch.Tensor | None = None
        self._score: Score | None = None
        self._keeps = False
        self.states: torch.Tensor | None = None

    @contextmanager
    def select(
        self, prediction_index: torch.Tensor | None, score: Score | None = None, keep_states: bool = False
    ) -> Iterator[None]:
        """Restrict forward passes inside the `with` to `prediction_index`: int64 [N], flat positions into B·S.

        None does not restrict them.

        Args:
            keep_states: leave the encoder's output in `states`; not `output_hidden_states`, which keeps every layer's.
        """
        self._index, self._score, self._keeps = prediction_index, score if self.scores else None, keep_states
        try:
            yield
        finally:
            self._index = self._score = self.states = None
            self._keeps = False

    def rows(self, logits: torch.Tensor, prediction_index: torch.Tensor | None) -> torch.Tensor:
        """Return the logits [N, V] at the selected positions, from what a forward pass inside `select` returned."""
        if prediction_index is None:
            return logits.flatten(0, -2)
        return logits if self.in_head else _rows(logits, prediction_index)

    def keep_selected(self, head: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        """Cut encoder output [B, S, H] to its selected rows [N, H]; the forward pre-hook of the head."""
        hidden, *others = args
        if self._keeps:
            self.states = hidden
        if self._index is None:
            return None
        return (_rows(hidden, self._index), *others)

    def score_in(self, projection: nn.Linear) -> None:
        """Let the last matrix of a head return scores [N, c] for [.., H], as often as it is asked to."""
        plain, vocabulary_size = projection.forward, projection.out_features

        def forward(input: torch.Tensor) -> torch.Tensor:
            if self._score is None:
                return plain(input)
            return _in_pieces(plain, input.flatten(0, -2), self._score, vocabulary_size)

        projection.forward = forward


def head_module(model: PreTrainedModel) -> str | None:
    """Name the submodule that first receives the encoder's output; None where it is not known.

    A class with code of its own says it in an attribute `maskwright_head`: what it names must work on each position
    alone, and get the encoder's output as its first argument.
    """
    if not is_stock(type(model)):
        return getattr(model, "maskwright_head", None)
    if is_detector(model.config):
        return None  # it tells something of each position
    if model.config.model_type == "deberta-v2" and not model.config.legacy:
        return "lm_predictions"
    return HEAD_MODULES.get(model.config.model_type)


def projection_of(model: PreTrainedModel) -> str | None:
    """Name the submodule whose output a known causal class returns as logits; None for any other class."""
    return PROJECTIONS.get(model.config.model_type) if is_stock(type(model)) else None


def vocabulary_logits(output: Any) -> torch.Tensor:
    """Return the logits of the vocabulary, under whichever of its names a stock class has put them out."""
    found = getattr(output, "prediction_logits", None)
    return output.logits if found is None else found


def pair_logits(output: Any) -> torch.Tensor | None:
    """Return the logits [B, 2] of a head for pairs of segments; None from a class without one."""
    named = (getattr(output, name, None) for name in ("seq_relationship_logits", "sop_logits"))
    return next((found for found in named if found is not None), None)


def install(model: PreTrainedModel) -> PredictionHead:
    """Let the head of a stock model be restricted to predicted positions.

    A forward pre-hook, not a new forward: it composes with DeepSpeed's hooks that gather a ZeRO-3 partition, and
    torch.compile traces through it in one graph. Install before the model is compiled.
    """
    name, projection = head_module(model), projection_of(model)
    head = PredictionHead(in_head=name is not None, scores=projection is not None)
    if name is not None:
        model.get_submodule(name).register_forward_pre_hook(head.keep_selected)
    if projection is not None:
        last = model.get_submodule(projection)
        assert isinstance(last, nn.Linear)
        head.score_in(last)
    return head


def _in_pieces(
    project: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, score: Score, vocabulary_size: int
) -> torch.Tensor:
    """Project [N, H] to logits and score them, so many rows at a time that LOGITS_AT_ONCE hold their logits."""

    def of_rows(rows: torch.Tensor, *beside: torch.Tensor) -> torch.Tensor:
        return score.function(project(rows), *beside)

    pieces = -(-len(hidden) * vocabulary_size // LOGITS_AT_ONCE)
    if pieces == 1:
        return of_rows(hidden, *score.rows)
    size = -(-len(hidden) // pieces)
    parts = zip(hidden.split(size), *(rows.split(size) for rows in score.rows), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([of_rows(*part) for part in parts])
    # Nothing in a head is drawn at random, and to look the generator's state up would wait for the device.
    kept = [checkpoint(of_rows, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    return torch.cat(kept)


def _rows(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return states.flatten(0, -2).index_select(0, index)
