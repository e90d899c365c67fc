"""A model that begins with layers of a trained one: some, as DistilBERT (Sanh et al., arXiv:1910.01108), or widened."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from trainer.config import LayersFromConfig, ModelConfig
from trainer.errors import UserError
from trainer.model.account import account_for_weights
from trainer.model.hf_config import build_config, head_width_of, heads_of, vocabulary_rows
from trainer.model.source import cards_for
from trainer.model.stock import stock_model, tied_to
from trainer.model.tiling import TILED, Tiling, layers_for
from trainer.model.weight_files import weight_shapes
from trainer.runtime.plain_text import listed

if TYPE_CHECKING:
    from trainer.data.tokenizer import Vocabulary

KEY = "model.layers_from"
_OF = "The model whose layers are taken"
_LISTED = 4
_TYPES = "bert.embeddings.token_type_embeddings.weight"
_POSITIONS = "distilbert.embeddings.position_embeddings.weight"
_BERT_OF_DISTILBERT: Mapping[str, str] = {
    "distilbert.embeddings.": "bert.embeddings.",
    "distilbert.transformer.layer.": "bert.encoder.layer.",
    ".attention.q_lin.": ".attention.self.query.",
    ".attention.k_lin.": ".attention.self.key.",
    ".attention.v_lin.": ".attention.self.value.",
    ".attention.out_lin.": ".attention.output.dense.",
    ".sa_layer_norm.": ".attention.output.LayerNorm.",
    ".ffn.lin1.": ".intermediate.dense.",
    ".ffn.lin2.": ".output.dense.",
    ".output_layer_norm.": ".output.LayerNorm.",
    "vocab_transform.": "cls.predictions.transform.dense.",
    "vocab_layer_norm.": "cls.predictions.transform.LayerNorm.",
    "vocab_projector.": "cls.predictions.decoder.",
}
"""Parts of the names of DistilBERT's weights → what BERT has there."""
_USES: Mapping[str, str] = {
    **{name: name for name in ("hidden_act", "hidden_activation", "activation_function", "norm_eps", "layer_norm_eps")},
    **{name: name for name in ("layer_norm_epsilon", "rms_norm_eps", "rope_parameters", "local_attention")},
    "activation": "hidden_act",
}
"""Fields of a config that decide what its layers' weights do → what BERT calls them, of a DistilBERT's."""


def source_settings(settings: LayersFromConfig) -> ModelConfig:
    """Make the settings of the model that layers are taken from, as one to continue from."""
    return ModelConfig(from_pretrained=settings.model)


@dataclass(frozen=True)
class _Taken:
    """What fills a model.

    Attributes:
        layers: which of the source's layers become the model's, in this order.
        pairs: each weight and buffer of the model → the name of the one there.
        tiling: how weights are widened; None where they are alike.
    """

    layers: Sequence[int]
    pairs: Mapping[str, str]
    tiling: Tiling | None

    def value(self, name: str, own: torch.Tensor, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Make what fills a weight; of a table of tokens the first rows, as many as the model has."""
        value = given[self.pairs[name]]
        value = value[: len(own)] if own.ndim else value
        return value if self.tiling is None else self.tiling.make(name, value, own.shape)


def check_layers(model: PreTrainedModel, settings: LayersFromConfig, vocabulary: Vocabulary, family: str) -> None:
    """Check without storage whether the layers fit a model, which may be on torch's meta device.

    Raises:
        UserError: when there is no such model, it lacks weights, or its layers are not of a kind with the model's.
    """
    with cards_for(f"{KEY}.model", _OF):
        config = build_config(source_settings(settings), vocabulary, seq_len=1, family=family)
        account_for_weights(config, settings.model, weight_shapes(settings.model))
    _find(model, stock_model(config, "meta"), settings)


def copy_layers(
    model: PreTrainedModel,
    settings: LayersFromConfig,
    load: Callable[[ModelConfig], tuple[PreTrainedModel, Sequence[str]]],
) -> list[str]:
    """Copy embeddings, layers, norms and head into a model; returns lines for the user.

    Of a table of tokens the rows of the tokenizer are taken. A DistilBERT has no types of tokens: BERT's first one,
    which every token of a block has, is added to the positions, so that a copy of all layers gives the same logits.

    Args:
        load: builds the model that layers are taken from, with a row for each token of the tokenizer; and what there
            is to be said of it.

    Raises:
        UserError: as `check_layers`, and when one weight of the model is two different ones there.
    """
    with cards_for(f"{KEY}.model", _OF):
        source, notes = load(source_settings(settings))
    taken, given = _find(model, source, settings), source.state_dict()
    own, ties = model.state_dict(), tied_to(model)
    for name in taken.pairs:
        value = taken.value(name, own[name], given)
        first = ties.get(name, name)
        if first != name and not torch.equal(taken.value(first, own[name], given), value):
            raise UserError(
                f"{name} and {first} are one weight of the model, and two different ones in '{settings.model}'.",
                where=f"{KEY}.model",
                remedy="Set model.overrides.tie_word_embeddings=false.",
            )
        own[name].copy_(value)
    if _is_from_bert(model, source):
        own[_POSITIONS] += given[_TYPES][0]
    numbers = ", ".join(map(str, taken.layers))
    widths = f"{source.config.hidden_size:,} to {model.config.hidden_size:,}"
    return [
        *(note for note in notes if note.startswith(("checkpoint", "vocabulary", "code"))),
        f"layers: {numbers} of the {_depth(source.config)} of {settings.model}, and its embeddings, norms and head",
        *([f"layers: tiled from a width of {widths}"] if settings.tile else []),
    ]


def _find(model: PreTrainedModel, source: PreTrainedModel, settings: LayersFromConfig) -> _Taken:
    """Find for each weight and buffer of a model the name of the one that fills it.

    Raises:
        UserError: when one has none, or one of another shape, but for the rows of a table of tokens.
    """
    layers = _choose_layers(model, source, settings)
    tiling = Tiling(model, source.config) if settings.tile else None
    shapes, given = ({name: value.shape for name, value in each.state_dict().items()} for each in (model, source))
    rows = vocabulary_rows(model), vocabulary_rows(source)
    stack, from_bert = f"{_path_of_layers(model)}.", _is_from_bert(model, source)
    pairs, unlike = {}, []
    for name, shape in shapes.items():
        other = name
        if name.startswith(stack):
            number, _, rest = name.removeprefix(stack).partition(".")
            other = f"{stack}{layers[int(number)]}.{rest}"
        if from_bert:
            for part, in_bert in _BERT_OF_DISTILBERT.items():
                other = other.replace(part, in_bert)
        pairs[name] = other
        there = given.get(other)
        of_tokens = there is not None and (*shape[:1], *there[:1]) == rows
        taken = (*shape[:1], *there[1:]) if there is not None and of_tokens else there
        if taken != shape and not (tiling is not None and taken is not None and tiling.fits(name, taken, shape)):
            unlike.append(f"{name} is {list(shape)}, and there it is {'missing' if there is None else list(there)}")
    unused = _left_over(source, layers, set(pairs.values()))
    if unused:
        raise UserError(
            f"{len(unused)} weights of the layers have no place in the model: {listed(unused, _LISTED)}.",
            where=f"{KEY}.layers={list(layers)}",
            remedy="Choose layers that are built as the model's own, in their places.",
        )
    if unlike:
        what, sizes = "are not alike", "the sizes of that model, all but the number of layers"
        if tiling is not None:
            what, sizes = "do not grow from those", "its number of positions, and no smaller size than it has"
        raise UserError(
            f"{len(unlike)} weights {what} in '{settings.model}': {listed(unlike, _LISTED, '; ')}.",
            where=f"{KEY}.model={settings.model}",
            remedy=f"Give model.overrides {sizes}.",
        )
    return _Taken(layers, pairs, tiling)


def _left_over(source: PreTrainedModel, layers: Sequence[int], used: Collection[str]) -> list[str]:
    """List the weights of the chosen layers that no weight of the model takes."""
    chosen = tuple(f"{_path_of_layers(source)}.{number}." for number in layers)
    return [name for name in source.state_dict() if name.startswith(chosen) and name not in used]


def _choose_layers(model: PreTrainedModel, source: PreTrainedModel, settings: LayersFromConfig) -> Sequence[int]:
    """Choose which of the source's layers become the model's.

    Raises:
        UserError: where the models, or the layers, are not of a kind.
    """
    config, given = model.config, source.config
    kinds = (config.model_type, given.model_type)
    if (kinds[0] != kinds[1] and (settings.tile or kinds != ("distilbert", "bert"))) or "albert" in kinds:
        raise UserError(
            f"A model of type '{kinds[0]}' cannot begin with layers of one of type '{kinds[1]}'"
            f"{', tiled' if settings.tile else ''}.",
            where=f"{KEY}.model={settings.model}",
            remedy="Train one of the same type, or a distilbert with layers of a bert; albert's layers share weights.",
        )
    if settings.tile and kinds[0] not in TILED:
        raise UserError(
            f"How the weights of a '{kinds[0]}' are tiled is not known.",
            where=f"{KEY}.tile",
            remedy=f"Train one of {', '.join(TILED)}, or leave tile out and give the model the sizes of that one.",
        )
    layers = _layers_by_kind(model, source, settings) if settings.layers is None else settings.layers
    wanted, there = _depth(config), _depth(given)
    beyond = [number for number in layers if number >= there]
    if beyond:
        raise UserError(
            f"'{settings.model}' has {there} layers, and so none of number {beyond[0]}: they are counted from 0.",
            where=f"{KEY}.layers",
            remedy=f"Give numbers up to {there - 1}.",
        )
    if len(layers) != wanted:
        raise UserError(
            f"The model has {wanted} layers, and {len(layers)} are taken.",
            where=f"{KEY}.layers",
            remedy="Give as many numbers as it has layers, or set the number of layers in model.overrides.",
        )
    _refuse_other_use(config, given, settings, layers)
    _refuse_other_heads(config, given, settings)
    return layers


def _layers_by_kind(model: PreTrainedModel, source: PreTrainedModel, settings: LayersFromConfig) -> list[int]:
    """Choose by `layers_for` among the layers of each kind: with the same weights, and the same reach of attention.

    ModernBERT's first layer lacks a norm that the others have, and every third attends to all.
    """
    own, given = _kinds(model), _kinds(source)
    chosen: dict[int, int] = {}
    for kind, numbers in own.items():
        if kind not in given:
            raise UserError(
                f"No layer of '{settings.model}' is of the kind of layer {numbers[0]} of the model.",
                where=f"{KEY}.model={settings.model}",
                remedy="Give a model of more layers, or of the same fields.",
            )
        there = given[kind]
        chosen |= zip(numbers, (there[place] for place in layers_for(len(there), len(numbers))), strict=True)
    return [chosen[number] for number in range(_depth(model.config))]


def _kinds(model: PreTrainedModel) -> dict[tuple[str, frozenset[str]], list[int]]:
    """Sort the numbers of a model's layers by kind."""
    stack, types = f"{_path_of_layers(model)}.", getattr(model.config, "layer_types", None)
    names: dict[int, set[str]] = {number: set() for number in range(_depth(model.config))}
    for name in model.state_dict():
        if name.startswith(stack):
            number, _, rest = name.removeprefix(stack).partition(".")
            names[int(number)].add(rest)
    kinds: dict[tuple[str, frozenset[str]], list[int]] = {}
    for number, weights in names.items():
        kinds.setdefault((types[number] if types else "", frozenset(weights)), []).append(number)
    return kinds


def _refuse_other_heads(config: PretrainedConfig, source: PretrainedConfig, settings: LayersFromConfig) -> None:
    if settings.tile and head_width_of(config) != head_width_of(source):
        raise UserError(
            f"A head of the model is {head_width_of(config)} wide, and one of '{settings.model}' "
            f"{head_width_of(source)}: heads are taken whole.",
            where=f"{KEY}.tile",
            remedy=f"Give model.overrides a head for each {head_width_of(source)} of the width.",
        )
    if not settings.tile and heads_of(config) != heads_of(source):
        raise UserError(
            f"The model has {heads_of(config)} attention heads, and that of the layers {heads_of(source)}: the same "
            "weights would be used otherwise.",
            where=f"{KEY}.model={settings.model}",
            remedy="Give model.overrides the number of heads of that model.",
        )


def _refuse_other_use(
    config: PretrainedConfig, source: PretrainedConfig, settings: LayersFromConfig, layers: Sequence[int]
) -> None:
    """Refuse fields by which the same weights would compute something else."""
    ours, theirs = (getattr(each, "layer_types", None) for each in (config, source))
    if ours and theirs and list(ours) != [theirs[number] for number in layers]:
        raise UserError(
            f"The model's layers are {', '.join(ours)}, and those that are taken "
            f"{', '.join(theirs[number] for number in layers)}.",
            where=f"{KEY}.layers={list(layers)}",
            remedy="Choose layers of the same kinds in the same order.",
        )
    for name, other in _USES.items():
        given = getattr(source, other if source.model_type != config.model_type else name, None)
        own = getattr(config, name, None)
        if own is not None and given is not None and own != given:
            raise UserError(
                f"{name} is {own} in the model, and {given} in '{settings.model}': the same weights would be used "
                "otherwise.",
                where=f"{KEY}.model={settings.model}",
                remedy=f"Set model.overrides.{name}={given}.",
            )


def _is_from_bert(model: PreTrainedModel, source: PreTrainedModel) -> bool:
    return model.config.model_type == "distilbert" and source.config.model_type == "bert"


def _depth(config: PretrainedConfig) -> int:
    return config.num_hidden_layers


def _path_of_layers(model: PreTrainedModel) -> str:
    """Find the list of a model's layers: the first that has as many modules as there are layers."""
    inside = {id(module) for module in model.base_model.modules()}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == _depth(model.config) and id(module) in inside:
            return name
    raise UserError(
        f"Where the layers of {type(model).__name__} are is not known.",
        where=KEY,
        remedy="Leave it out, or train a model of another type.",
    )
