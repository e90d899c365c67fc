"""Weights of a checkpoint to continue from that the trained class has not, for those who use the model afterwards.

A masked-LM class has no pooler, and whoever fine-tunes the converted model as a classifier starts from one: from a
random one, if what the checkpoint had were lost.
"""

from __future__ import annotations

import copy

import torch
from transformers import PretrainedConfig, PreTrainedModel

from trainer.config import ModelConfig
from trainer.model.account import load_without_data, quiet_library
from trainer.model.classes import model_class, wider_classes
from trainer.model.stock import stock_model, tied_to
from trainer.model.weight_files import weight_shapes
from trainer.runtime.paths import is_local, user_path
from trainer.runtime.plain_text import listed

_LISTED = 6


def read_kept(model: PreTrainedModel, settings: ModelConfig) -> dict[str, torch.Tensor]:
    """Read the weights of the model's source that other classes of its type have, and its own has not.

    Only what has the shape that those classes give it beside the model as it is trained: a head over a vocabulary that
    has grown since does not.

    Returns:
        fp32, by their names beside the model's own in a file; none without a source.
    """
    source = settings.from_pretrained
    shapes = weight_shapes(source) if source is not None else None
    if source is None or shapes is None:
        return {}
    own, kept = set(tied_to(model)), {}
    for name in wider_classes(model.config):
        config = copy.deepcopy(model.config)
        config.architectures = [name]
        names = _names_beside(own | kept.keys(), config, model.base_model_prefix)
        config.tie_word_embeddings = False  # transformers cannot tie a table to one of another size
        if names and (found := _names_found(names, *load_without_data(config, shapes))):
            weights = _load(source, config).state_dict()
            kept |= {name: weights[found[name]].contiguous() for name in found}
    return kept


def describe_kept(kept: dict[str, torch.Tensor]) -> list[str]:
    """Say which weights go past the training; a line, or none."""
    names = listed(sorted(kept), _LISTED)
    return [f"checkpoint: of what is not used, kept for the converted model: {names}"] if kept else []


def _names_beside(own: set[str], config: PretrainedConfig, prefix: str) -> dict[str, str]:
    """Map the names that weights of a class have beside those of `own` in a file to their names in the class.

    A weight that is tied to one of `own` is none of its own.
    """
    wider = stock_model(config, "meta")
    is_bare = not hasattr(wider, prefix)
    in_file = {name: f"{prefix}.{name}" if is_bare else name for name in tied_to(wider)}
    return {in_file[name]: name for name, first in tied_to(wider).items() if name == first and in_file[name] not in own}


def _names_found(names: dict[str, str], _model: PreTrainedModel, report: dict[str, set]) -> dict[str, str]:
    """Choose those that loading finds."""
    lacking = {*report["missing_keys"], *(name for name, _, _ in report["mismatched_keys"])}
    return {name: in_class for name, in_class in names.items() if in_class not in lacking}


def _load(source: str, config: PretrainedConfig) -> PreTrainedModel:
    with quiet_library(), torch.random.fork_rng(devices=[]):
        return model_class(config).from_pretrained(
            user_path(source, "model.from_pretrained") if is_local(source) else source,
            config=config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            weights_only=True,
        )
