"""The matrices of a model's layers, which Muon updates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trainer.errors import UserError


def hidden_matrices(module: nn.Module, models: Mapping[str, PreTrainedModel]) -> tuple[str, ...]:
    """List the trained weights of linear layers that stand in an encoder's lists of layers.

    Neither embeddings, tables of positions and projections between embedding and layers are such, nor heads and
    poolers: their rows are tokens, positions or classes (arXiv:2502.16982, section 2.2, updates them by AdamW). XLNet's
    attention has weights of three dimensions, and is none either.

    Args:
        module: what is trained.
        models: those in it, as `BuiltModel.exports`.

    Returns:
        names in `module.named_parameters()`, in their order.
    """
    found = {id(layer.weight) for model in models.values() for layer in _in_layers(model) if _is_linear(layer)}
    return tuple(
        name
        for name, parameter in module.named_parameters()
        if id(parameter) in found and parameter.requires_grad and parameter.ndim == 2
    )


def require_matrices(module: nn.Module, models: Mapping[str, PreTrainedModel]) -> str:
    """Say in a line what Muon updates and what AdamW.

    Raises:
        UserError: when no matrix is left to Muon.
    """
    names = hidden_matrices(module, models)
    sizes = {name: parameter.numel() for name, parameter in module.named_parameters() if parameter.requires_grad}
    if not names:
        raise UserError(
            f"Muon has nothing to update in {' and '.join(type(model).__name__ for model in models.values())}: "
            "no matrix of its layers is trained.",
            where="optimizer.name=muon",
            remedy="Set optimizer.name to adamw, or leave matrices of the layers out of model.frozen.",
        )
    matrices = sum(sizes[name] for name in names)
    deep = {id(weight) for model in models.values() for layer in _in_layers(model) for weight in _deep_weights(layer)}
    also = f"; {len(deep):,} weights of its layers have three dimensions, and are not Muon's" if deep else ""
    return (
        f"optimizer: Muon updates {len(names):,} matrices of {matrices:,} parameters, "
        f"AdamW the other {sum(sizes.values()) - matrices:,}{also}"
    )


def _in_layers(model: PreTrainedModel) -> Iterator[nn.Module]:
    """Yield all modules within lists of modules of an encoder, some of them more than once."""
    for each in model.base_model.modules():
        if isinstance(each, nn.ModuleList):
            yield from each.modules()


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear | Conv1D)


def _deep_weights(layer: nn.Module) -> Iterator[nn.Parameter]:
    return (weight for weight in layer.parameters(recurse=False) if weight.ndim > 2 and weight.requires_grad)
