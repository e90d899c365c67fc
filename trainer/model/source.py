"""The folder that a model's config comes from: which file is the config, and of what model type the weights are."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig

from trainer.config import Config, ModelConfig
from trainer.data.tokenizer import Vocabulary, load_tokenizer, means_folder, read_vocabulary
from trainer.errors import MaskwrightError, UserError
from trainer.model.account import account_for_weights
from trainer.model.classes import FAMILIES, MASKED, choose_class
from trainer.model.weight_files import refuse_lfs_pointers, weight_shapes
from trainer.runtime.paths import is_local, real_path, user_path
from trainer.runtime.user_files import read_json

_WHERE = "model.from_pretrained"
_CONFIG = "config.json"
_STEP_FOLDER = re.compile(r"step-\d+$")


@contextmanager
def cards_for(key: str, of: str) -> Iterator[None]:
    """Let cards of what is read as `model.from_pretrained` name another key, and whose weights it is about.

    Args:
        of: such as "The teacher".
    """
    try:
        yield
    except MaskwrightError as error:
        error.problem = f"{of}: {error.problem}"
        error.where, error.remedy = (text.replace(_WHERE, key) for text in (error.where, error.remedy))
        if "model.code" in error.remedy:
            error.remedy = (
                "Only the model that is trained may have code of its own: give one of a class of transformers."
            )
        elif "model.overrides" in error.remedy:  # which are the trained model's
            error.remedy = f"Correct config.json there, or give another {key}."
        raise


def check_source(source: str) -> None:
    """Refuse a folder that is no model's, before its tokenizer or its config is looked for.

    Raises:
        UserError: for one that is not there or has no config.json, for a run of maskwright, with the command that makes
            a model of it, and for pointers of Git LFS.
    """
    if not means_folder(source):
        return
    folder = user_path(source, _WHERE)
    if not folder.is_dir():
        raise _no_model(source, "there is no such folder")
    is_run = any(_STEP_FOLDER.match(path.name) for path in (folder / "checkpoints").glob("step-*"))
    real = real_path(folder)
    if is_run or (_STEP_FOLDER.match(real.name) and (real / "manifest.json").is_file()):
        run = real if is_run else real.parent.parent
        output = f"{run.name}-model"
        raise UserError(
            f"'{source}' is a {'run' if is_run else 'checkpoint'} of maskwright, not yet a model.",
            where=_WHERE,
            remedy=f"Run `maskwright convert {shlex.quote(source)} --output {shlex.quote(output)}`, and set "
            f"model.from_pretrained={shlex.quote(output)}.",
        )
    refuse_lfs_pointers(folder)
    if not any(folder.glob("*config.json")):
        raise _no_model(source, "it has no config.json")


def _no_model(source: str, problem: str) -> UserError:
    return UserError(
        f"'{source}' is no model: {problem}.",
        where=_WHERE,
        remedy="Give a folder as save_pretrained writes it, or a name on the Hugging Face hub with its owner in front, "
        "as google-bert/bert-base-chinese.",
    )


def read_source(source: str, where: str, own_code: bool = False) -> tuple[dict[str, Any], str]:
    """Read the fields of a model's config, of which `model_type` is one of transformers' if the folder tells it.

    Where a checkpoint's config names no type, or one that its weights are not of, their names decide: Chinese BERTs
    are often published as `roberta`, and older checkpoints name none.

    Args:
        source: a file, a folder, or a name on the hub.
        where: the config key that gives it.
        own_code: whether its own code says what it is, so that the names of weights decide nothing.

    Returns:
        The fields, and a line for the user on what was decided; empty when all is as it should be.

    Raises:
        UserError: when there is no config, or its model type is not known.
    """
    if where == _WHERE:
        check_source(source)
    path = _config_file(source, where)
    if path is not None:
        fields = read_json(path, where, "Give a folder with config.json, as save_pretrained writes it.")
    else:
        fields = _from_hub(source, where)
    if not isinstance(fields, dict):
        raise _no_config(source, where, "it is no JSON object")
    fields = {name: value for name, value in fields.items() if name not in ("dtype", "torch_dtype")}
    declared = fields.get("model_type")
    own_code = own_code or (isinstance(fields.get("auto_map"), dict) and declared not in CONFIG_MAPPING)
    weights = _known_weights(source) if where == _WHERE and not own_code else None
    decided = _type_of_weights(source, fields, weights) if weights else None
    if decided is not None:
        said = f"{path.name if path else _CONFIG} says '{declared}'" if declared else "its config names none"
        note = f"model type: {decided}, as the names of the weights are ({said})"
        return {**fields, "model_type": decided}, note
    if not isinstance(declared, str):
        raise _no_config(source, where, "it names no model_type", _is_bert_like(source))
    is_other = path is not None and path.name != _CONFIG and where == _WHERE
    return fields, f"model config: {path.name}" if path is not None and is_other else ""


def source_note(settings: ModelConfig) -> str:
    """Return the line of `read_source` on a model to continue from; empty when there is nothing to say."""
    if settings.from_pretrained is None:
        return ""
    return read_source(settings.from_pretrained, _WHERE, settings.code)[1]


def _config_file(source: str, where: str) -> Path | None:
    """Find config.json or, where there is none, the one file such as bert_config.json; None for a name on the hub."""
    if not is_local(source):
        return None
    path = user_path(source, where)
    if not path.is_dir() or (path / _CONFIG).exists():
        return path / _CONFIG if path.is_dir() else path
    others = [file for file in sorted(path.glob("*_config.json")) if _describes_a_model(file)]
    return others[0] if len(others) == 1 else path / _CONFIG


def _describes_a_model(path: Path) -> bool:
    try:
        fields = read_json(path, _WHERE, "")
    except (UserError, OSError):
        return False
    return isinstance(fields, dict) and {"vocab_size", "hidden_size"} <= fields.keys()


def _from_hub(source: str, where: str) -> Any:
    try:
        return PretrainedConfig.get_config_dict(source)[0]
    except (OSError, ValueError) as error:
        message = " ".join(str(error).split())
        raise UserError(
            f"Cannot read a model config from '{source}': {message[:300]}",
            where=where,
            remedy="Give a folder with config.json, as save_pretrained writes it, or a name that the hub has.",
        ) from None


def _type_of_weights(source: str, fields: Mapping[str, Any], weights: Mapping[str, torch.Size]) -> str | None:
    """Find the model type that the weights' names begin with, where it is not the config's and fits; None otherwise."""
    declared, begins = fields.get("model_type"), {name.partition(".")[0] for name in weights}
    if isinstance(declared, str) and _prefix_of(declared) in begins:
        return None
    found = [name for name in _masked_lm_types() if name.replace("-", "_") in begins and name != declared]
    if len(found) != 1 or not _fits(source, fields, found[0], weights):
        return None
    return found[0]


def _known_weights(source: str) -> dict[str, torch.Size] | None:
    """Read the shapes of the weights, if they can be read: a plan needs none, and a start says why they cannot."""
    try:
        return weight_shapes(source)
    except UserError:
        return None


def _masked_lm_types() -> Collection[str]:
    return FAMILIES[MASKED].classes.keys()


def _prefix_of(model_type: str) -> str | None:
    """Find what the names of the weights of a type's encoder begin with."""
    found = [family.classes[model_type] for family in FAMILIES.values() if model_type in family.classes]
    return getattr(transformers, found[0]).base_model_prefix if found else None


def _fits(source: str, fields: Mapping[str, Any], model_type: str, weights: Mapping[str, torch.Size]) -> bool:
    """Tell whether the encoder of a type has all its weights there, in the shapes that the config says."""
    try:
        config = CONFIG_MAPPING[model_type].from_dict({**fields, "model_type": model_type})
        choose_class(config, MASKED)
        account_for_weights(config, source, weights)
    except Exception:  # a config of another class may be refused in any way
        return False
    return True


def _is_bert_like(source: str) -> str:
    folder = user_path(source, _WHERE) if is_local(source) else None
    if folder is not None and (folder / "vocab.txt").is_file():
        return ' With a vocab.txt it may be a BERT: add "model_type": "bert".'
    return ' Add it, as in "model_type": "bert".'


def _no_config(source: str, where: str, why: str, hint: str = "") -> UserError:
    return UserError(
        f"The config in '{source}' is not that of a Hugging Face model: {why}.",
        where=where,
        remedy=f"Give a config.json as save_pretrained writes it.{hint}",
    )


def load_vocabulary(config: Config) -> Vocabulary:
    """Read what training needs to know of the run's tokenizer.

    Raises:
        UserError: when there is none, or it lacks a token.
    """
    folder, tokenizer = open_tokenizer(config)
    return read_vocabulary(tokenizer, folder)


def open_tokenizer(config: Config) -> tuple[str, Any]:
    """Load the run's tokenizer; returns its folder or hub name, and the tokenizer.

    Raises:
        UserError: when there is none, naming the key.
    """
    folder = tokenizer_source(config)
    key = "model.from_pretrained" if config.model.tokenizer is None else "model.tokenizer"
    return folder, load_tokenizer(folder, where=f"{key}={folder}")


def tokenizer_source(config: Config) -> str:
    """Return the folder or hub name of the tokenizer."""
    folder = config.model.from_pretrained if config.model.tokenizer is None else config.model.tokenizer
    assert folder is not None
    if config.model.from_pretrained is not None:
        check_source(config.model.from_pretrained)
    return folder
