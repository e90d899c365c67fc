"""Weights that stay as they are: the parameters that the patterns of `model.frozen` name."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

from torch import nn

from trainer.errors import UserError
from trainer.model.stock import tied_to
from trainer.runtime.plain_text import listed

_LISTED = 4


def freeze(model: nn.Module, patterns: Sequence[str]) -> tuple[str, ...]:
    """Freeze the parameters that a pattern names, as a shell names files; to be done before the engine is made.

    A tied parameter has several names, and a pattern for any of them freezes it. What the class itself does not train,
    such as sinusoidal positions, is none of these.

    Returns:
        The first name of each parameter that is frozen now.

    Raises:
        UserError: when a pattern names nothing, or all of them everything.
    """
    if not patterns:
        return ()
    first = tied_to(model)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in first):
            raise _names_nothing(pattern, first, type(model).__name__)
    chosen = {own for name, own in first.items() if any(fnmatchcase(name, pattern) for pattern in patterns)}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    frozen = tuple(name for name in trained if name in chosen)
    if len(frozen) == len(trained):
        raise UserError(
            f"All weights of {type(model).__name__} are frozen: nothing is left to train.",
            where=f"model.frozen={list(patterns)}",
            remedy=f"Leave some out, as {_example(model)} does, which keeps the layers and trains the rest.",
        )
    for name in frozen:
        trained[name].requires_grad_(False)
    return frozen


def describe_frozen(model: nn.Module, frozen: Collection[str]) -> list[str]:
    """Say how much is frozen, and which of it is known by other names too; nothing where nothing is."""
    if not frozen:
        return []
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    count, total = sum(sizes[name] for name in frozen), sum(sizes.values())
    lines = [
        f"frozen: {count:,} of {total:,} parameters ({count / total:.1%}), in {len(frozen):,} of {len(sizes):,} weights"
    ]
    ties = [f"{name} is {first} as well" for name, first in tied_to(model).items() if first in frozen and name != first]
    if ties:
        lines.append(f"frozen: {listed(ties, _LISTED)}")
    return lines


def _names_nothing(pattern: str, names: Collection[str], of: str) -> UserError:
    """Name what comes nearest, of single weights and of all that have a beginning in common."""
    beginnings = {
        ".".join([*name.split(".")[:depth], "*"]) for name in names for depth in range(1, name.count(".") + 1)
    }
    nearest = difflib.get_close_matches(pattern, sorted({*names, *beginnings}), n=1, cutoff=0.0)
    return UserError(
        f"No weight of {of} has a name like '{pattern}'.",
        where=f"model.frozen={pattern}",
        remedy=f"The nearest is '{nearest[0]}'. A pattern is for the whole name, with * for any part of it.",
    )


def _example(model: nn.Module) -> str:
    """Write a pattern for the longest list of modules of the encoder, which its layers are."""
    lists = {
        name: len(list(module.children()))
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    }
    return f'["{max(lists, key=lambda name: lists[name])}.*"]' if lists else "a pattern for one of its parts"
