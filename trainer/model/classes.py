"""Which class of transformers a run trains; masked language models are named nowhere else."""

from __future__ import annotations

from typing import Any

from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoModelForMaskedLM, PretrainedConfig

AutoClass = AutoModelForMaskedLM
"""Builds and loads it by the type of a config."""


def has_class(config_class: type[PretrainedConfig]) -> bool:
    """Tell whether models of this type can be trained."""
    return config_class in MODEL_FOR_MASKED_LM_MAPPING


def model_class_of(config_class: type[PretrainedConfig]) -> Any:
    """Return the class of a type that `has_class`."""
    return MODEL_FOR_MASKED_LM_MAPPING[config_class]
