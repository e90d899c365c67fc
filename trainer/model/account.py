"""What a checkpoint's weights give a model, and what they lack: accounted for by name, with or without their data."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging as library_log

from trainer.errors import UserError
from trainer.model.classes import model_class
from trainer.runtime.plain_text import listed

_LISTED = 6


def account_for_weights(
    config: PretrainedConfig, source: str, shapes: Mapping[str, torch.Size] | None, whole: bool = False
) -> list[str]:
    """Find what loading them into the class of a config will say; nothing for None, which are not known.

    Args:
        shapes: as `weight_shapes` gives them. One number stands for all of a weight, so that they take no memory.
        whole: as for `account_for_keys`.

    Returns:
        Lines for the user, as `account_for_keys`.

    Raises:
        UserError: as `account_for_keys`.
    """
    if shapes is None:
        return []
    try:
        model, report = load_without_data(config, shapes)
    except NotImplementedError:  # transformers cannot tie a weight to one of another shape
        untied = copy.deepcopy(config)
        untied.tie_word_embeddings = False
        model, report = load_without_data(untied, shapes)
    return account_for_keys(model, source, report, whole)


def load_without_data(config: PretrainedConfig, shapes: Mapping[str, torch.Size]) -> tuple[PreTrainedModel, Any]:
    """Load weights of these shapes into the class of a config; returns what `from_pretrained` does, with its report."""
    number = torch.zeros(())
    with quiet_library(), torch.random.fork_rng(devices=[]):  # what is missing is drawn at random
        return model_class(config).from_pretrained(
            None,
            config=config,
            state_dict={name: number.expand(shape) for name, shape in shapes.items()},
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )


def account_for_keys(model: PreTrainedModel, source: str, report: Mapping[str, Any], whole: bool = False) -> list[str]:
    """Judge the report of `from_pretrained`.

    Args:
        whole: whether a head that starts at random is refused as well.

    Returns:
        Lines for the user: what starts at random, what is not used.

    Raises:
        UserError: when the encoder lacks weights, or any has another shape than the config says.
    """
    name, where = type(model).__name__, "model.from_pretrained"
    differing = [f"{key} has {list(there)}, the config makes {list(here)}" for key, there, here in _mismatches(report)]
    if differing:
        raise UserError(
            f"In '{source}' the config and {len(differing)} weights of {name} have different shapes: "
            f"{listed(differing, _LISTED, '; ')}.",
            where=where,
            remedy="Correct config.json there (vocab_size, the sizes); it may belong to other weights.",
        )
    parameters = {key for key, _ in model.named_parameters(remove_duplicate=False)}
    missing = sorted(parameters.intersection(report["missing_keys"]))
    unused = sorted(report["unexpected_keys"])
    encoder = [key for key in missing if key.startswith(f"{model.base_model_prefix}.") and not _of_pooler(key)]
    if encoder:
        prefix, other = _wrapper(encoder, unused), _other_prefix(encoder, unused)
        raise UserError(
            f"'{source}' lacks {len(encoder)} weights of the encoder of {name}: {listed(encoder, _LISTED)}."
            + (f" Its weights' names begin with '{prefix}', which a wrapper has put there." if prefix else "")
            + (f" It holds {listed(unused, 2)}." if unused and not prefix else ""),
            where=where,
            remedy=f"Save them without it, with `name.removeprefix('{prefix}')` for each name."
            if prefix
            else f"If it is this architecture, save its weights with `name.replace('{other}.', "
            f"'{model.base_model_prefix}.', 1)` for each name."
            if other
            else "Give a checkpoint of this architecture; its config.json and its weights may not belong together.",
        )
    if missing and whole:
        raise UserError(
            f"'{source}' has no weights for {listed(missing, _LISTED)}: they would be drawn at random.",
            where=where,
            remedy=f"Give a checkpoint of {name} with its head.",
        )
    notes = []
    if missing:
        notes.append(f"checkpoint: no weights for {listed(missing, _LISTED)}; initialised at random")
    if unused:
        notes.append(f"checkpoint: not used: {listed(unused, _LISTED)}")
    return notes


def _of_pooler(key: str) -> bool:
    """Tell whether a weight is of the pooler: it goes with the head for pairs, and a masked-LM model has none."""
    return "pooler" in key.split(".")


def _mismatches(report: Mapping[str, Any]) -> list[tuple[str, torch.Size, torch.Size]]:
    return sorted(report["mismatched_keys"], key=lambda entry: entry[0])


def _other_prefix(missing: Sequence[str], unused: Sequence[str]) -> str:
    """Find what stands in the unused names where the missing ones have the encoder's own name: NEZHA's may say bert."""
    held = set(unused)
    for prefix in sorted({name.partition(".")[0] for name in unused}):
        if all(f"{prefix}.{name.partition('.')[2]}" in held for name in missing):
            return prefix
    return ""


def _wrapper(missing: Sequence[str], unused: Sequence[str]) -> str:
    """Find what stands before the missing names in most of the unused ones, such as 'module.' or '_orig_mod.'."""
    wanted = set(missing)
    found: Counter[str] = Counter()
    for name in unused:
        places = [place + 1 for place, character in enumerate(name) if character == "."]
        found.update(name[:place] for place in places if name[place:] in wanted)
    prefix, count = found.most_common(1)[0] if found else ("", 0)
    return prefix if 2 * count > len(missing) else ""


@contextmanager
def quiet_library() -> Iterator[None]:
    """Keep the library's own report and progress bar off the console."""
    level, bar = library_log.get_verbosity(), library_log.is_progress_bar_enabled()
    library_log.set_verbosity_error()
    library_log.disable_progress_bar()
    try:
        yield
    finally:
        library_log.set_verbosity(level)
        if bar:
            library_log.enable_progress_bar()
