"""The theta of a model's rotary position embeddings: where its config has it, and how a model is given another one.

The frequencies are those that transformers' own class computes for a config with that theta, so a model that is given
one has the bits of a model built with it. They are written in place: a compiled model and CUDA graphs read the same
memory as before.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from trainer.config import DataConfig, RopeTheta
from trainer.errors import UserError

_BASE, _LOCAL = "full_attention", "sliding_attention"  # the layer types of transformers' configs
_OF_LENGTH = ("dynamic", "longrope")  # whose frequencies follow from the length of a text, and not from theta alone


def theta_of(config: PretrainedConfig) -> RopeTheta | None:
    """Read the theta of a model's config; None where it has none."""
    parameters = getattr(config, "rope_parameters", None)
    if isinstance(parameters, Mapping):
        if isinstance(parameters.get(_BASE), Mapping):
            base, local = (_number((parameters.get(name) or {}).get("rope_theta")) for name in (_BASE, _LOCAL))
        else:
            base, local = _number(parameters.get("rope_theta")), None
    else:
        base, local = _number(getattr(config, "rope_theta", None)), None
    return None if base is None else RopeTheta(base, local)


def put_theta(config: PretrainedConfig, theta: RopeTheta) -> None:
    """Write a theta into a config that has one; what is the same stays as it is written."""
    parameters: Any = copy.deepcopy(getattr(config, "rope_parameters", None))  # which may be the run config's own
    if not isinstance(parameters, dict):
        config.rope_theta = _as_written(theta.base, config.rope_theta)
        return
    places = {_BASE: theta.base, _LOCAL: theta.local} if isinstance(parameters.get(_BASE), dict) else {"": theta.base}
    for name, value in places.items():
        if value is not None:
            place = parameters[name] if name else parameters
            place["rope_theta"] = _as_written(value, place["rope_theta"])
    config.rope_parameters = parameters


def set_theta(model: PreTrainedModel, theta: RopeTheta) -> None:
    """Give a model another theta: its frequencies in place, and its config, which says what it computes with."""
    for module in _rotary_modules(model):
        for name, frequencies in _frequencies(module, theta).items():
            module.get_buffer(name).copy_(frequencies)
    configs = {id(config): config for config in (model.config, *(module.config for module in _rotary_modules(model)))}
    for config in configs.values():
        put_theta(config, theta)


def check_theta(config: PretrainedConfig, data: DataConfig) -> RopeTheta:
    """Return the theta of a config, for a run whose phases change it.

    Raises:
        UserError: when it has none, or not those that the phases name.
    """
    key = next(key for phase in data.phases for key in ("rope_theta", "local_rope_theta") if getattr(phase, key))
    own = theta_of(config)
    if own is None:
        raise _fixed(f"The config of a model of type '{config.model_type}' names no theta", key)
    if own.local is None and any(phase.local_rope_theta is not None for phase in data.phases):
        raise _fixed(
            f"A model of type '{config.model_type}' has one theta, and none of local layers", "local_rope_theta"
        )
    parameters: Any = getattr(config, "rope_parameters", None) or {}
    for kind in (parameters, *(each for each in parameters.values() if isinstance(each, Mapping))):
        if any(name in str(kind.get("rope_type")) for name in _OF_LENGTH):
            raise _fixed(f"Its rope_type is '{kind['rope_type']}', which follows the length of a text", key)
    return own


def prove_theta(model: PreTrainedModel, data: DataConfig) -> None:
    """See that a model computes with the theta of its config, and can be given another; it may be on meta.

    Raises:
        UserError: when not.
    """
    own = check_theta(model.config, data)
    other = RopeTheta(2 * own.base, None if own.local is None else 2 * own.local)
    key, name = "rope_theta", type(model).__name__
    try:
        pairs = [(_frequencies(module, own), _frequencies(module, other)) for module in _rotary_modules(model)]
    except Exception as error:  # of a class with code of its own
        raise _fixed(
            f"The frequencies of {name} cannot be computed anew ({type(error).__name__}: {error})", key
        ) from error
    if not pairs or any(torch.equal(one[each], two[each]) for one, two in pairs for each in one):
        raise _fixed(f"{name} does not compute with the theta of its config", key)


def _fixed(problem: str, key: str) -> UserError:
    return UserError(
        f"{problem}, so phases cannot change it.",
        where=f"data.phases[].{key}",
        remedy=f"Leave {key} out of data.phases, or train a model with rotary positions, such as ModernBERT, EuroBERT "
        "or ESM.",
    )


def _rotary_modules(model: PreTrainedModel) -> list[Any]:
    """Find the modules that keep frequencies, as those of transformers do: with the config that they made them from."""
    return [module for module in model.modules() if _buffers(module) and hasattr(module, "config")]


def _buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer for name, buffer in module.named_buffers(recurse=False) if name.endswith("inv_freq")}


def _frequencies(module: Any, theta: RopeTheta) -> dict[str, torch.Tensor]:
    """Compute the frequencies of a module for a theta, by the names of its buffers; on the CPU, as models are built."""
    config = copy.deepcopy(module.config)
    put_theta(config, theta)
    with torch.device("cpu"):
        return _buffers(type(module)(config))


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _as_written(value: float, before: Any) -> float:
    """Keep the kind of number that stands there: a config's hash tells 10000 from 10000.0."""
    return int(value) if isinstance(before, int) and value == int(value) else float(value)
