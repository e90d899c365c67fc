"""A start rehearsed without storage: what a model's class would refuse later is refused before data are read."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from trainer.config import ModelConfig
from trainer.errors import UserError
from trainer.model.account import account_for_weights
from trainer.model.build import constant_inputs, grow_vocabulary
from trainer.model.classes import CAUSAL, MASKED, PERMUTED, is_detector, is_in
from trainer.model.frozen import freeze
from trainer.model.hf_config import build_config, position_offset, vocabulary_rows
from trainer.model.hidden_states import cannot_be_probed, last_states, showing_states
from trainer.model.layers import check_layers
from trainer.model.model_code import code_of, is_stock, place_of
from trainer.model.prediction_head import PredictionHead, head_module, install, vocabulary_logits
from trainer.model.stock import prove_convertible, stock_model
from trainer.model.two_streams import predicting_in_order
from trainer.model.weight_files import weight_shapes

if TYPE_CHECKING:
    from trainer.data.tokenizer import Vocabulary

_META = "meta"
_MOST_WITH_VALUES = 2**28
"""Parameters of a model that is built with values for its rehearsal: 1 GiB, for a moment."""


def rehearse(
    settings: ModelConfig, vocabulary: Vocabulary, seq_lens: Sequence[int], family: str = MASKED
) -> PreTrainedModel:
    """Do on torch's meta device what a start does with a model: load, grow, save and read, one block forward.

    Args:
        seq_lens: tokens a block: `data.seq_len`, and those of the phases.
        family: as for `build_config`.

    Returns:
        the model on that device.

    Raises:
        UserError: as `build_config` and `build_model`, and for a config whose class cannot compute a block.
    """
    config = build_config(settings, vocabulary, seq_lens[0], family)
    where = _section(settings)
    _refuse_not_finite_fields(config, settings, where)
    model = stock_model(config, _META)
    _refuse_empty_weights(model, settings, where)
    _refuse_shared_padding(model, vocabulary)
    _initialize(model, settings, where)
    if settings.from_pretrained is not None:
        account_for_weights(config, settings.from_pretrained, weight_shapes(settings.from_pretrained))
        if vocabulary_rows(model) < vocabulary.size:
            grow_vocabulary(model, vocabulary.size)
    if settings.layers_from is not None:
        check_layers(model, settings.layers_from, vocabulary, family)
    prove_convertible(model)
    freeze(model, settings.frozen)
    head = install(model)
    lengths = sorted(set(seq_lens))
    if not all(_one_block(model, settings, seq_len, where) for seq_len in lengths) and _is_small(model):
        with_values = stock_model(model.config, "cpu")
        freeze(with_values, settings.frozen)
        for seq_len in lengths:
            _one_block(with_values, settings, seq_len, where)
    _prove_own_head(model, head, lengths[0], where)
    return model


def rehearse_states(config: PretrainedConfig) -> None:
    """See that the last hidden states of padded texts are to be had of a model, as a probe needs them.

    Raises:
        UserError: when its class cannot leave padding out, its encoder cannot be told from its head, or its states are
            not those of its tokens.
    """
    model = stock_model(config, _META)
    name = type(model).__name__
    if not is_in(config, CAUSAL) and "attention_mask" not in inspect.signature(model.forward).parameters:
        raise cannot_be_probed(f"{name} takes no `attention_mask`, and would read padding as text")
    if head_module(model) is not None:  # which is given them
        return
    if model.base_model is model:
        raise cannot_be_probed(f"The encoder of {name} cannot be told from its head")
    if not _shows_states(model) and _is_small(model):
        _shows_states(stock_model(config, "cpu"))


def _shows_states(model: PreTrainedModel) -> bool:
    """Look at the states of two short texts; returns False on meta, for a class that looks at values."""
    input_ids = torch.zeros(2, 8, dtype=torch.int64, device=model.device)
    try:
        with torch.no_grad(), showing_states(model) as shown:
            model.eval()(input_ids)
    except Exception:
        return False
    last_states(model, shown, input_ids)
    return True


def _section(settings: ModelConfig) -> str:
    given = ("preset", "config", "from_pretrained")
    return next(f"model.{name}" for name in given if getattr(settings, name) is not None)


def _place(name: str, settings: ModelConfig, where: str) -> str:
    """Say where a user has set a field of the model's config."""
    return f"model.overrides.{name}" if name in settings.overrides else f"{where}: {name}"


def _refuse_not_finite_fields(config: PretrainedConfig, settings: ModelConfig, where: str) -> None:
    for name, value in config.to_dict().items():
        if any(isinstance(number, float) and not math.isfinite(number) for number in _leaves(value)):
            raise UserError(
                f"{name} of the model's config is not finite: {value}.",
                where=_place(name, settings, where),
                remedy="Give a finite number.",
            )


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _refuse_empty_weights(model: PreTrainedModel, settings: ModelConfig, where: str) -> None:
    """Refuse a weight without elements: a table of no rows is built without a word, and fails at the first look-up."""
    for weight, parameter in model.named_parameters():
        if parameter.numel() == 0:
            zeros = [name for name, value in model.config.to_dict().items() if type(value) is int and value == 0]
            guilty = [name for name in zeros if name.endswith(("_size", "_dim", "embeddings", "width"))]
            raise UserError(
                f"{type(model).__name__} would have a weight without elements, {weight} {list(parameter.shape)}"
                + (f": {', '.join(guilty)} is 0." if guilty else "."),
                where=_place(guilty[0], settings, where) if guilty else where,
                remedy="Give at least 1.",
            )


def _refuse_shared_padding(model: PreTrainedModel, vocabulary: Vocabulary) -> None:
    """Refuse a padding token with another role where positions are counted from the tokens that are no padding."""
    if position_offset(model) and vocabulary.shared_pad:
        raise UserError(
            f"The tokenizer's padding token has another role as well, and {type(model).__name__} gives padding no "
            "position: outside of training it would place text otherwise.",
            where="model.tokenizer",
            remedy="Give it a padding token of its own with tokenizer.add_special_tokens, and save the folder again.",
        )


def _initialize(model: PreTrainedModel, settings: ModelConfig, where: str) -> None:
    """Draw the weights, which on meta costs nothing, and refuses what a start would: a negative deviation."""
    try:
        model.initialize_weights()
    except Exception as error:
        name = _guilty_field(model.config, " ".join(str(error).split()))
        raise UserError(
            f"{type(model).__name__} cannot draw its first weights: {error}",
            where=_place(name, settings, where) if name else where,
            remedy="Correct it in the model's config or model.overrides.",
        ) from None


def _is_small(model: PreTrainedModel) -> bool:
    return sum(parameter.numel() for parameter in model.parameters()) <= _MOST_WITH_VALUES


def _one_block(model: PreTrainedModel, settings: ModelConfig, seq_len: int, where: str) -> bool:
    """Compute a block's logits on the model's device.

    Returns:
        False on meta, for a class that looks at values (Longformer, Reformer).

    Raises:
        UserError: when the class cannot, gives logits of another shape, or they depend on frozen weights alone.
    """
    device = model.device
    input_ids = torch.zeros(1, seq_len, dtype=torch.int64, device=device)
    arguments = constant_inputs(model, seq_len, device)
    if is_in(model.config, PERMUTED):
        order = torch.arange(seq_len, device=device)
        arguments |= predicting_in_order(order[None], order, model.dtype)
    try:
        with torch.set_grad_enabled(bool(settings.frozen)):
            output = model.train()(input_ids=input_ids, **arguments)
    except Exception as error:
        message = " ".join(str(error).split())
        if device.type == _META and (isinstance(error, NotImplementedError) or "meta" in message):
            return False
        name, own = _guilty_field(model.config, message), place_of(error, code_of(model.config))
        raise UserError(
            f"{type(model).__name__} cannot compute a block of {seq_len} tokens: {message}",
            where=f"{where}: {own}" if own else _place(name, settings, where) if name else where,
            remedy="Correct it in the model's config or model.overrides, or set another data.seq_len.",
        ) from None
    logits = _logits_of(model, output, where)
    shape, expected = list(logits.shape), [1, seq_len, vocabulary_rows(model)]
    if is_detector(model.config):  # of ELECTRA's one logit there is no dimension
        shape, expected = shape[:2], expected[:2]
    if shape != expected:
        is_length = len(shape) == 3 and shape[1] != seq_len  # as of Perceiver, which has a number of its own
        raise UserError(
            f"{type(model).__name__} gives logits of shape {shape} for {seq_len} tokens, and not {expected}.",
            where="data.seq_len" if is_length else where,
            remedy=f"Set data.seq_len={shape[1]}, or train a model of another type."
            if is_length
            else "Let its head give a logit for each token of the vocabulary, at each position.",
        )
    tensors = [value for value in output.values() if isinstance(value, torch.Tensor)]
    if settings.frozen and not any(tensor.requires_grad for tensor in tensors):
        raise UserError(
            f"No logit of {type(model).__name__} depends on a weight that is not frozen: there is nothing to learn.",
            where=f"model.frozen={settings.frozen}",
            remedy="Freeze less: a part that leads to logits has to be trained.",
        )
    return True


def _logits_of(model: PreTrainedModel, output: Any, where: str) -> torch.Tensor:
    """Return the logits of a forward pass, which a class with code of its own may have put elsewhere.

    Raises:
        UserError: when there are none.
    """
    logits = vocabulary_logits(output) if isinstance(output, ModelOutput) else None
    if isinstance(logits, torch.Tensor):
        return logits
    found = "no `logits`" if isinstance(output, ModelOutput) else f"a {type(output).__name__}"
    raise UserError(
        f"The forward pass of {type(model).__name__} gives {found}, and not an output with `logits`.",
        where=where,
        remedy="Return a transformers.modeling_outputs.MaskedLMOutput(logits=...) from `forward`.",
    )


def _prove_own_head(model: PreTrainedModel, head: PredictionHead, seq_len: int, where: str) -> None:
    """Compute the logits of two positions of a block, where a class with code of its own names its head.

    Raises:
        UserError: when that gives anything but their logits.
    """
    name = head_module(model)
    if name is None or is_stock(type(model)):
        return
    index = torch.tensor([0, seq_len - 1], device=model.device)
    found: Any = None
    try:
        with torch.no_grad(), head.select(index):
            input_ids = torch.zeros(1, seq_len, dtype=torch.int64, device=model.device)
            output = model(input_ids=input_ids, **constant_inputs(model, seq_len, model.device))
            found = list(head.rows(vocabulary_logits(output), index).shape)
    except Exception as error:
        found = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if found != [2, vocabulary_rows(model)]:
        raise UserError(
            f"With '{name}' given two positions, {type(model).__name__} does not give the logits of two: {found}.",
            where=f"{where}, maskwright_head = '{name}'",
            remedy="Name the submodule that first receives the encoder's output and works on each position alone, or "
            "leave maskwright_head out.",
        )


def _guilty_field(config: PretrainedConfig, message: str) -> str | None:
    """Find the field that an error speaks of: by its name, or by a value that the class's default has not."""
    fields = config.to_dict()
    named = [name for name in fields if name in message]
    if named:
        return max(named, key=len)
    usual = type(config)().to_dict()
    words = {word.strip(".,:;()[]'\"") for word in message.split()}
    changed = [
        name
        for name, value in fields.items()
        if _is_telling(value) and value != usual.get(name) and words & {str(value), f"{value:g}"}
    ]
    return changed[0] if len(changed) == 1 else None


def _is_telling(value: Any) -> bool:
    """Tell whether a number is seldom enough to know a field by it."""
    return (type(value) is int and value > 1) or (type(value) in (int, float) and value < 0)
