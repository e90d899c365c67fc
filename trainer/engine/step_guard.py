"""Skips the updates that must not happen: the optimizer is left without parameters for one step."""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import Enum, auto
from typing import Any

import torch


class StepState(Enum):
    """What is known of the step under way."""

    OPEN = auto()
    """Nothing yet: the norm is known when ZeRO has reduced the gradients, in the middle of its step."""
    LET_THROUGH = auto()
    """The norm is finite and below the bound: the optimizer updates."""
    WITHHELD = auto()
    """It is not: the optimizer is called and finds no parameters, so that weights and state stay."""


class StepGuard:
    """Decides for each step whether the optimizer may update, once the global norm of the gradients is known.

    A step goes through these states:

        begin() ──► OPEN ──► decide(norm) ──► LET_THROUGH
                     │             └────────► WITHHELD
                     └──► stays OPEN where nobody asks for the norm: without a bound DeepSpeed judges by itself

    At ZeRO 0 the engine calls `decide` before the step. At the other stages the optimizer's hook does, the first time
    that it is called within the step: ZeRO calls it once for each flat partition, when it knows the norm and has waited
    for it. Gradients are left in place: with offload they are buffers that DeepSpeed uses again.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, read_norm: Callable[[], torch.Tensor | float]) -> None:
        """Watch over an optimizer; `read_norm` gives the global norm, before clipping, in the middle of a step."""
        self._read_norm = read_norm
        self._bound: float | None = None
        self._state = StepState.OPEN
        self._parameters: list[tuple[dict[str, Any], Any]] = []  # of the groups that are without them just now
        self.norm: float | None = None
        """Global norm of the last step's gradients, where the host has read it."""
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def begin(self, bound: float | None) -> None:
        """Begin a step; an update whose norm is above the bound is withheld, and None leaves the norm unread."""
        self.norm, self._bound, self._state = None, bound, StepState.OPEN

    def decide(self, norm: torch.Tensor | float) -> None:
        """Judge the step under way by its global norm."""
        self.norm = float(norm)
        is_good = math.isfinite(self.norm) and (self._bound is None or self.norm <= self._bound)
        self._state = StepState.LET_THROUGH if is_good else StepState.WITHHELD

    @property
    def has_withheld(self) -> bool:
        """Whether the last step's update was withheld."""
        return self._state is StepState.WITHHELD

    def _before(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._state is StepState.OPEN and self._bound is not None:
            self.decide(self._read_norm())
        if self.has_withheld:
            self._parameters = [(group, group["params"]) for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["params"] = []

    def _after(self, *_: Any) -> None:
        for group, parameters in self._parameters:
            group["params"] = parameters
        self._parameters = []
