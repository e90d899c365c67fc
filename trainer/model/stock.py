"""The stock class that `maskwright convert` builds, and the proof at the start that what is trained fits it."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from trainer.errors import UserError
from trainer.model.classes import model_class
from trainer.model.model_code import AUTO_CONFIG, ModelCode, code_of
from trainer.runtime.plain_text import listed

# What a saved config may say otherwise without another model following from it.
_FREE_FIELDS = ("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype")


def stock_model(config: PretrainedConfig, device: str) -> PreTrainedModel:
    """Build a model of the class that a config names, weights tied as the config says; on 'meta' without storage."""
    with torch.device(device):
        model = model_class(config)._from_config(config)
    model.to(device)  # XLNet makes its weights of attention on the CPU, whatever the device
    model.tie_weights()
    return model


def tied_to(model: nn.Module) -> dict[str, str]:
    """Map each name of a parameter to the first name of the same parameter: its own, where it is not tied."""
    first: dict[int, str] = {}
    names = model.named_parameters(remove_duplicate=False)
    return {name: first.setdefault(id(parameter), name) for name, parameter in names}


def untie_if_trained_apart(config: PretrainedConfig, trained: Collection[str]) -> list[str]:
    """Correct a config that ties what is trained as several weights.

    A checkpoint may hold an embedding and a decoder that differ although its config says that they are one;
    transformers then leaves them apart, and leaves the config as it is.

    Args:
        config: changed in place.
        trained: the name of each trained weight, once.

    Returns:
        The names of the weights that the config tied; empty when it was right.
    """
    ties = tied_to(stock_model(config, "meta"))
    apart = [name for name, first in ties.items() if name != first and {name, first} <= set(trained)]
    if not apart:
        return []
    config.tie_word_embeddings = False
    return [ties[apart[0]], *apart]


def origins(stock: PreTrainedModel, trained: Collection[str]) -> dict[str, str]:
    """Find for each weight of the stock class, by each of its names, the trained weight that fills it, if there is one.

    That is its own name or, in a class that is not tied by its config, one that it is tied to otherwise: BERT's
    decoder has its bias under two names, which are one weight only as long as the embedding is the decoder's.
    """
    partners = ties = tied_to(stock)
    if not getattr(stock.config, "tie_word_embeddings", False):
        config = copy.deepcopy(stock.config)
        config.tie_word_embeddings = True
        partners = tied_to(stock_model(config, "meta"))
    names = {name: name for name in trained}
    for table in (partners, ties):
        for name in trained:
            if name in table:
                names.setdefault(table[name], name)
    found = {name: names.get(name) or names.get(first) or names.get(partners[name]) for name, first in ties.items()}
    return {name: origin for name, origin in found.items() if origin is not None}


def prove_convertible(model: PreTrainedModel) -> None:
    """Build what `convert` will build from the saved config, without storage, and compare it with what is trained.

    Raises:
        UserError: when the config does not survive being saved, or its class has other weights, shapes or ties.
    """
    name = type(model).__name__
    try:
        config = _saved_and_read(model.config)
        stock = stock_model(config, "meta")
    except Exception as error:  # whatever a class makes of its own config
        message = " ".join(str(error).split())
        raise _not_convertible(name, f"its config does not read back ({type(error).__name__}: {message})") from error
    fields = [field for field in _differing(model.config, config) if field not in _FREE_FIELDS]
    if fields:
        raise _not_convertible(name, f"its config changes when it is saved: {listed(fields)}")
    trained = {name: tensor.shape for name, tensor in model.named_parameters()}
    found = origins(stock, trained)
    ours, theirs = tied_to(model), tied_to(stock)
    expected = {name: tensor.shape for name, tensor in stock.named_parameters(remove_duplicate=False)}
    faults = [name for name in expected if name not in found or trained[found[name]] != expected[name]]
    faults += [name for name in ours if name not in theirs]
    faults += [name for name, first in theirs.items() if ours.get(name) != ours.get(first)]
    buffers = {name for name, _ in stock.named_buffers()}
    faults += [name for name in model.state_dict() if name not in expected and name not in buffers]
    if faults:
        raise _not_convertible(name, f"its saved config makes other weights: {listed(sorted(set(faults)))}")


def first_not_finite(model: torch.nn.Module) -> str | None:
    """Find the name of the first weight that holds NaN or an infinity; None when there is none.

    A sum is finite only if all that it adds is (but for an overflow, so what is found is looked at again): one pass at
    the speed of memory, without a copy.
    """
    for name, weight in model.named_parameters():
        if not weight.detach().sum().isfinite() and not weight.detach().isfinite().all():
            return name
    return None


def _saved_and_read(config: PretrainedConfig) -> PretrainedConfig:
    with tempfile.TemporaryDirectory(prefix="maskwright-config-") as folder:
        config.save_pretrained(folder)
        return read_config(folder, code_of(config))


def read_config(folder: str | Path, code: ModelCode | None) -> PretrainedConfig:
    """Read the config in a folder by its class, which `code` has; None stands for transformers."""
    if code is not None:
        return code.load(AUTO_CONFIG).from_pretrained(folder)
    return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def _differing(one: PretrainedConfig, other: PretrainedConfig) -> list[str]:
    ours, theirs = (_plain(config.to_dict()) for config in (one, other))
    return sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(fields, default=str))


def _not_convertible(name: str, why: str) -> UserError:
    return UserError(
        f"What {name} trains here could not be converted: {why}.",
        where="model",
        remedy="Train a model of another type, or with another version of transformers.",
    )
