"""A model that begins with some layers of a trained one, as DistilBERT does (Sanh et al., arXiv:1910.01108)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from trainer.config import LayersFromConfig, ModelConfig
from trainer.errors import UserError
from trainer.model.account import account_for_weights
from trainer.model.hf_config import build_config, heads_of, vocabulary_rows
from trainer.model.source import cards_for
from trainer.model.stock import stock_model, tied_to
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


def check_layers(model: PreTrainedModel, settings: LayersFromConfig, vocabulary: Vocabulary, family: str) -> None:
    """Check without storage whether the layers fit a model, which may be on torch's meta device.

    Raises:
        UserError: when there is no such model, it lacks weights, or its layers are not of a kind with the model's.
    """
    with cards_for(f"{KEY}.model", _OF):
        config = build_config(source_settings(settings), vocabulary, seq_len=1, family=family)
        account_for_weights(config, settings.model, weight_shapes(settings.model))
    _pair_names(model, stock_model(config, "meta"), settings)


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
    pairs, given = _pair_names(model, source, settings), source.state_dict()
    own, ties = model.state_dict(), tied_to(model)
    for name, other in pairs.items():
        value = _rows_for(own[name], given[other])
        first = ties.get(name, name)
        if first != name and not torch.equal(_rows_for(own[name], given[pairs[first]]), value):
            raise UserError(
                f"{name} and {first} are one weight of the model, and two different ones in '{settings.model}'.",
                where=f"{KEY}.model",
                remedy="Set model.overrides.tie_word_embeddings=false.",
            )
        own[name].copy_(value)
    if _is_from_bert(model, source):
        own[_POSITIONS] += given[_TYPES][0]
    numbers = ", ".join(map(str, settings.layers))
    return [
        *(note for note in notes if note.startswith(("checkpoint", "vocabulary", "code"))),
        f"layers: {numbers} of the {_depth(source.config)} of {settings.model}, and its embeddings, norms and head",
    ]


def _pair_names(model: PreTrainedModel, source: PreTrainedModel, settings: LayersFromConfig) -> dict[str, str]:
    """Find for each weight and buffer of a model the name of the one that fills it.

    Raises:
        UserError: when one has none, or one of another shape, but for the rows of a table of tokens.
    """
    _refuse_other_kind(model.config, source.config, settings)
    shapes, given = ({name: value.shape for name, value in each.state_dict().items()} for each in (model, source))
    rows = vocabulary_rows(model), vocabulary_rows(source)
    stack, from_bert = f"{_path_of_layers(model)}.", _is_from_bert(model, source)
    pairs, unlike = {}, []
    for name, shape in shapes.items():
        other = name
        if name.startswith(stack):
            number, _, rest = name.removeprefix(stack).partition(".")
            other = f"{stack}{settings.layers[int(number)]}.{rest}"
        if from_bert:
            for part, in_bert in _BERT_OF_DISTILBERT.items():
                other = other.replace(part, in_bert)
        pairs[name] = other
        there = given.get(other)
        of_tokens = there is not None and (*shape[:1], *there[:1]) == rows and shape[1:] == there[1:]
        if there != shape and not of_tokens:
            unlike.append(f"{name} is {list(shape)}, and there it is {'missing' if there is None else list(there)}")
    unused = _left_over(source, settings, set(pairs.values()))
    if unused:
        raise UserError(
            f"{len(unused)} weights of the layers have no place in the model: {listed(unused, _LISTED)}.",
            where=f"{KEY}.layers={settings.layers}",
            remedy="Choose layers that are built as the model's own, in their places.",
        )
    if unlike:
        raise UserError(
            f"{len(unlike)} weights are not alike in '{settings.model}': {listed(unlike, _LISTED, '; ')}.",
            where=f"{KEY}.model={settings.model}",
            remedy="Give model.overrides the sizes of that model, all but the number of layers.",
        )
    return pairs


def _left_over(source: PreTrainedModel, settings: LayersFromConfig, used: Collection[str]) -> list[str]:
    """List the weights of the chosen layers that no weight of the model takes."""
    chosen = tuple(f"{_path_of_layers(source)}.{number}." for number in settings.layers)
    return [name for name in source.state_dict() if name.startswith(chosen) and name not in used]


def _refuse_other_kind(config: PretrainedConfig, source: PretrainedConfig, settings: LayersFromConfig) -> None:
    kinds = (config.model_type, source.model_type)
    if (kinds[0] != kinds[1] and kinds != ("distilbert", "bert")) or "albert" in kinds:
        raise UserError(
            f"A model of type '{kinds[0]}' cannot begin with layers of one of type '{kinds[1]}'.",
            where=f"{KEY}.model={settings.model}",
            remedy="Train one of the same type, or a distilbert with layers of a bert; albert's layers share weights.",
        )
    wanted, there = _depth(config), _depth(source)
    beyond = [number for number in settings.layers if number >= there]
    if beyond:
        raise UserError(
            f"'{settings.model}' has {there} layers, and so none of number {beyond[0]}: they are counted from 0.",
            where=f"{KEY}.layers",
            remedy=f"Give numbers up to {there - 1}.",
        )
    if len(settings.layers) != wanted:
        raise UserError(
            f"The model has {wanted} layers, and {len(settings.layers)} are taken.",
            where=f"{KEY}.layers",
            remedy="Give as many numbers as it has layers, or set the number of layers in model.overrides.",
        )
    _refuse_other_use(config, source, settings)
    if heads_of(config) != heads_of(source):
        raise UserError(
            f"The model has {heads_of(config)} attention heads, and that of the layers {heads_of(source)}: the same "
            "weights would be used otherwise.",
            where=f"{KEY}.model={settings.model}",
            remedy="Give model.overrides the number of heads of that model.",
        )


def _refuse_other_use(config: PretrainedConfig, source: PretrainedConfig, settings: LayersFromConfig) -> None:
    """Refuse fields by which the same weights would compute something else."""
    ours, theirs = (getattr(each, "layer_types", None) for each in (config, source))
    if ours and theirs and list(ours) != [theirs[number] for number in settings.layers]:
        raise UserError(
            f"The model's layers are {', '.join(ours)}, and those that are taken "
            f"{', '.join(theirs[number] for number in settings.layers)}.",
            where=f"{KEY}.layers={settings.layers}",
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


def _rows_for(own: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """Take the first rows of a table of tokens, as many as there are for them; other weights are alike."""
    return given[: len(own)] if own.ndim else given
