"""A forward pass over packed blocks: adds position_ids and token_type_ids, computes logits where they are needed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from trainer.data.batch import RANKS, Documents, Score
from trainer.errors import UserError
from trainer.model.build import constant_inputs
from trainer.model.causal_attention import causal_masks, use_causal_sdpa
from trainer.model.classes import CAUSAL, MAIN, is_detector, is_in
from trainer.model.document_attention import DocumentAttention
from trainer.model.hidden_states import last_states, showing_states
from trainer.model.prediction_head import install, pair_logits, vocabulary_logits
from trainer.model.two_streams import keep_positions_in_dtype, predicting_in_order


class Pass(NamedTuple):
    """What one of the models that a run trains was given, and what it has made of that.

    Attributes:
        inputs: as for `Forward`.
        logits: [n, c] at the positions that were asked for.
        pair_logits: [B, 2] of a class with a head for pairs.
    """

    inputs: dict[str, torch.Tensor]
    logits: torch.Tensor
    pair_logits: torch.Tensor | None


class Forward:
    """Calls a stock model; made before the model is wrapped, partitioned or compiled, because it puts a hook into it.

    Attributes:
        call: the model; DeepSpeed's engine once that has wrapped it.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device, document_attention: bool = False) -> None:
        self.model, self.device = model, device
        self.call: Callable[..., Any] = model
        self.document_attention = DocumentAttention(model, device) if document_attention else None
        self._head, self._detects = install(model), is_detector(model.config)
        if self.document_attention is None:
            use_causal_sdpa(model)
        keep_positions_in_dtype(model)
        # Some classes look for padding among the tokens, for which the host waits; a block of the stream has none.
        base: Any = model.base_model
        base.warn_if_padding_and_no_attention_mask = lambda *_: None
        self._constants: dict[int, dict[str, Any]] = {}  # by seq_len

    def constants(self, seq_len: int) -> dict[str, Any]:
        """Make, once, the arguments that are the same for all blocks of so many tokens."""
        if seq_len not in self._constants:
            masks = causal_masks(self.model, seq_len, self.device)
            self._constants[seq_len] = {**constant_inputs(self.model, seq_len, self.device), **masks}
        return self._constants[seq_len]

    def passes(self, inputs: Mapping[str, torch.Tensor], prediction_index: torch.Tensor) -> dict[str, Pass]:
        """Run what is trained once, and tell of each model in it, by `BuiltModel.exports`, what it has computed."""
        output = self(inputs, prediction_index)
        return {MAIN: Pass(dict(inputs), output.logits, output.pair_logits)}

    def states(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Run the model on texts that are padded at their ends, each a sequence of its own.

        The whole model is called, as in training, though its encoder would do: so ZeRO-3 gathers in the order that it
        knows. Its head computes the first position of each text alone, where that can be asked for.

        Args:
            inputs: `input_ids` and `attention_mask`, 0 for padding, int64 [B, S].

        Returns:
            [B, S, H], its last hidden states; those of padding mean nothing.

        Raises:
            UserError: when they are of other shapes.
        """
        rows, seq_len = inputs["input_ids"].shape
        constants = self.constants(seq_len)
        arguments = {**constants, **inputs}
        if is_in(self.model.config, CAUSAL):  # no token sees the padding, and masks are among the constants
            arguments = {"input_ids": inputs["input_ids"], **constants}
        if not self._head.in_head and "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            arguments["logits_to_keep"] = 1
        first = torch.arange(rows, device=self.device) * seq_len
        with showing_states(self.model) as shown, self._head.select(first, keep_states=True):
            self.call(**arguments)
            if self._head.states is not None:  # OPT's encoder is not called as a whole
                shown.append(self._head.states)
        return last_states(self.model, shown, inputs["input_ids"])

    def __call__(
        self,
        inputs: Mapping[str, torch.Tensor],
        prediction_index: torch.Tensor | None,
        documents: Documents | None = None,
        score: Score | None = None,
        with_states: bool = False,
    ) -> Any:
        """Run the model on B blocks of S tokens.

        Args:
            inputs: arguments of the model's forward, among them `input_ids`, int64 [B, S]; `RANKS` as in a `Batch`.
            prediction_index: int64 [n], flat positions into B·S; None for all of them. With ranks as many a block.
            documents: attention stays within them; without, each block is one sequence.
            score: what is wanted in the place of logits.
            with_states: whether the states that the head is given are wanted as well, of a model whose head is known.

        Returns:
            The model's output, its `logits` [n, vocabulary] at these positions or, with `score`, [n, c]; of a model
            that tells which tokens were replaced [n, 1]. And its `pair_logits` [B, 2], None of a class without a head
            for pairs; and `states` [B, S, H] if they are wanted.

        Raises:
            UserError: when a model whose head is not known gives logits of other positions than it was given.
        """
        input_ids = inputs["input_ids"]
        seq_len = input_ids.shape[1]
        arguments = {**self.constants(seq_len), **inputs}
        if documents is not None:
            assert self.document_attention is not None
            arguments |= self.document_attention.inputs(documents)
        in_order = RANKS in arguments
        if in_order:
            assert prediction_index is not None
            arguments |= predicting_in_order(arguments.pop(RANKS), prediction_index, self.model.dtype)
            prediction_index = None  # the model's logits are there alone
        with self._head.select(prediction_index, score, with_states):
            output = self.call(**arguments)
            output.states = self._head.states
        output.pair_logits = pair_logits(output)
        if score is not None and self._head.scores:
            return output
        logits = vocabulary_logits(output)
        if self._detects:
            logits = logits.unsqueeze(-1) if logits.ndim == input_ids.ndim else logits
        shape = logits.shape[:2]
        if not (self._head.in_head or in_order) and shape != input_ids.shape:  # Perceiver's are of all its positions
            raise UserError(
                f"{type(self.model).__name__} gives logits of {shape[1]} positions for a block of {seq_len} tokens.",
                where="data.seq_len",
                remedy=f"Set data.seq_len={shape[1]}, or train a model of another type.",
            )
        logits = self._head.rows(logits, prediction_index)
        output.logits = logits if score is None else score.function(logits, *score.rows)
        return output
