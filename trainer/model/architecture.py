"""What a run trains: the fields of its model's config, the class of that config, and whose code both are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from trainer.config import ModelConfig
from trainer.errors import UserError, nearest
from trainer.model.classes import CAUSAL, FAMILIES, MASKED, PAIRED, PERMUTED
from trainer.model.model_code import (
    AUTO_CONFIG,
    SHIPPED,
    ModelCode,
    place_of,
    read_code,
    shipped_code,
    wants_code,
)
from trainer.model.presets import PRESETS
from trainer.model.source import read_source
from trainer.runtime.paths import is_local, real_path, user_path

_OBJECTIVES_OF = {
    "objective.name=mlm": MASKED,
    "objective.name=clm": CAUSAL,
    "objective.name=plm": PERMUTED,
}


@dataclass(frozen=True)
class Architecture:
    """Which classes a run's model is of.

    Attributes:
        where: the config key that names it.
        fields: of the config, as they are found there; `model_type` among them.
        config_class: of the config.
        code: the code of the classes; None for those of transformers.
    """

    where: str
    fields: dict[str, Any]
    config_class: type[PretrainedConfig]
    code: ModelCode | None


def find_architecture(settings: ModelConfig, family: str) -> Architecture:
    """Find what `model.preset`, `model.config` or `model.from_pretrained` names; runs its code, if that is asked for.

    Raises:
        UserError: for an unknown preset, a file that is no config, a type that has no class in the family, and code
            that is not asked for, or cannot be used.
    """
    where, fields = _source(settings)
    code = _code(settings, where, fields)
    config_class = _known_class(fields, where) if code is None else _own_class(code, fields, family)
    excluded = ("is_encoder_decoder",) if family == CAUSAL else ("is_decoder", "is_encoder_decoder")
    is_other = any({**vars(config_class()), **fields}.get(name) for name in excluded)
    _refuse_parts(config_class, where)
    if is_other or not _has_class(fields["model_type"], code, family):
        raise _other_family(fields["model_type"], code, where, family, is_other)
    return Architecture(where, fields, config_class, code)


def _source(settings: ModelConfig) -> tuple[str, dict[str, Any]]:
    """Find the config key that names the architecture, and the fields found there."""
    if settings.preset is not None:
        if settings.preset not in PRESETS:
            raise UserError(
                f"No preset '{settings.preset}'.{nearest(settings.preset, list(PRESETS))}",
                where="model.preset",
                remedy=f"Choose one of {', '.join(PRESETS)}, or give model.config.",
            )
        return "model.preset", dict(PRESETS[settings.preset])
    source = settings.config or settings.from_pretrained
    where = "model.config" if settings.config is not None else "model.from_pretrained"
    assert source is not None, "the schema says so"
    if settings.code and not is_local(source):
        raise UserError(
            f"'{source}' is no folder on this machine, and code is run from a folder alone.",
            where=where,
            remedy=f"Download it, look at its code, and give its folder: `hf download {source} --local-dir DIR`.",
        )
    return where, read_source(source, where, settings.code)[0]


def _code(settings: ModelConfig, where: str, fields: Mapping[str, Any]) -> ModelCode | None:
    """Read the code of the model's folder where it is asked for, or maskwright's own; nothing of it is run.

    The folder of a type that transformers or maskwright has may name code of its own; without `model.code` it is the
    known class that is trained, as transformers does without trust_remote_code.
    """
    if settings.code:
        source = settings.config or settings.from_pretrained
        assert source is not None, "the schema says so"
        path = real_path(user_path(source, where))
        return read_code(path if path.is_dir() else path.parent, where, fields)
    model_type = fields["model_type"]
    if isinstance(fields.get("auto_map"), dict) and model_type not in {*CONFIG_MAPPING, *SHIPPED}:
        raise wants_code(where, fields)
    return shipped_code(model_type)


def _known_class(fields: Mapping[str, Any], where: str) -> type[PretrainedConfig]:
    model_type, known = fields["model_type"], list(CONFIG_MAPPING)
    if model_type not in known:
        raise UserError(
            f"Model type '{model_type}' is not known to the installed transformers.{nearest(model_type, known)}",
            where=where,
            remedy="Correct model_type, or install a version of transformers that has it.",
        )
    return CONFIG_MAPPING[model_type]


def _own_class(code: ModelCode, fields: Mapping[str, Any], family: str) -> type[PretrainedConfig]:
    """Import the class of the config, and look whether transformers could use it."""
    config_class = code.load(AUTO_CONFIG)
    try:
        config_class()
    except Exception as error:
        raise UserError(
            f"{config_class.__name__}() cannot be made without arguments, as transformers makes it: {error}",
            where=f"{code.where}: {place_of(error, code) or code.file_of(AUTO_CONFIG)}",
            remedy="Give all of its arguments defaults.",
        ) from error
    if config_class.model_type != fields["model_type"]:
        raise UserError(
            f"{config_class.__name__} is of model type '{config_class.model_type}', its config.json of "
            f"'{fields['model_type']}'.",
            where=f"{code.where}: {code.file_of(AUTO_CONFIG)}",
            remedy="Give both the same model_type.",
        )
    return config_class


def _refuse_parts(config_class: type[PretrainedConfig], where: str) -> None:
    parts: Any = config_class.sub_configs
    if parts and not hasattr(config_class(), "vocab_size"):
        raise UserError(
            f"'{config_class.model_type}' is a model of several parts ({', '.join(parts)}), and "
            "only encoders of text are trained here.",
            where=where,
            remedy="Train its text encoder alone, with model.config or model.from_pretrained of that.",
        )


def _has_class(model_type: str, code: ModelCode | None, family: str) -> bool:
    if code is None:
        return model_type in FAMILIES[family].classes
    return family in (MASKED, CAUSAL) and code.class_name(FAMILIES[family].auto_class) is not None


def _other_family(model_type: str, code: ModelCode | None, where: str, family: str, is_other: bool) -> UserError:
    fits = [name for name, other in _OBJECTIVES_OF.items() if _has_class(model_type, code, other)]
    if family == PAIRED:
        fits = ["objective.pair=null" if name == "objective.name=mlm" else name for name in fits]
    wanted = FAMILIES[family]
    or_with = f", or train this one with {' or '.join(fits)}." if fits and not is_other else "."
    if code is not None and not code.is_shipped and not is_other and family in (MASKED, CAUSAL):
        return UserError(
            f"The folder's own code has no {wanted.kind}: no auto_map entry '{wanted.auto_class}'.",
            where=f"{where}: {code.folder / 'config.json'}",
            remedy=f'Add "{wanted.auto_class}": "MODULE.CLASS" to its auto_map{or_with}',
        )
    return UserError(
        f"'{model_type}', as configured, is no {wanted.kind}.",
        where=where,
        remedy=f"Choose a model type such as {wanted.examples}{or_with}",
    )
