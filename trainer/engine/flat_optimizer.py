"""What the optimizers of our own have in common: they know which parameters lie in a flat tensor of ZeRO.

DeepSpeed hands flat tensors to an optimizer, in which the parameters of a group lie end to end, or pieces of them.
AdamW treats each element alone and need not know. Where an update depends on a whole parameter, it has to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trainer.engine.partitions import state_of
from trainer.engine.state_layout import FlatLayout, joined

kernels: Any = torch
"""torch's kernels over lists of tensors, whose names it keeps private."""


@dataclass(frozen=True)
class RankPlace:
    """Which rank this is, of how many, and the device of their collectives."""

    rank: int
    ranks: int
    device: torch.device


@dataclass(frozen=True)
class Flats:
    """Flat tensors that are updated together, each fp32 [n].

    Attributes:
        layout: of them all.
        moments: by kind, as the others in the order of the tensors.
        steps: fp32 [], how many updates there have been.
    """

    layout: FlatLayout
    weights: list[torch.Tensor]
    gradients: list[torch.Tensor]
    moments: dict[str, list[torch.Tensor]]
    steps: list[torch.Tensor]


class FlatOptimizer(torch.optim.Optimizer):
    """An optimizer whose `update` sees the parameters in the flat tensors.

    It divides gradients by `grad_scale`, as torch's fused optimizers do. Until it is told the layout, every tensor is
    a parameter of its own, and no other rank has any of it.

    Not a subclass of AdamW: torch has the hooks of a step run by each class whose `step` is called.
    """

    grad_scale: torch.Tensor | None = None

    def __init__(self, groups: Iterable[dict[str, Any]], defaults: dict[str, Any]) -> None:
        super().__init__(groups, defaults)
        self._layouts: Mapping[torch.Tensor, FlatLayout] = {}
        self._joined: dict[tuple[int, ...], FlatLayout] = {}
        self.place = RankPlace(0, 1, self.param_groups[0]["params"][0].device)

    def lay_out(self, layouts: Mapping[torch.Tensor, FlatLayout], place: RankPlace) -> None:
        """Say what lies in each tensor that is to be updated, which are DeepSpeed's from now on."""
        self._layouts, self.place = layouts, place
        self._joined.clear()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure is ever given
        """Update all groups; where ranks are to help each other, all of them call it with the same groups."""
        for group in self.param_groups:
            tensors = [tensor for tensor in group["params"] if tensor.grad is not None]
            if not tensors:  # a step that is withheld (`StepGuard`), on all ranks
                continue
            flats = self._flats(tensors, group)
            if self.grad_scale is not None:
                kernels._foreach_div_(flats.gradients, self.grad_scale)
            kernels._foreach_add_(flats.steps, 1.0)
            self.update(flats, group)

    def update(self, flats: Flats, group: Mapping[str, Any]) -> None:
        """Update the tensors of a group; gradients may be overwritten, and steps count this one already."""
        raise NotImplementedError

    def _flats(self, tensors: Sequence[torch.Tensor], group: Mapping[str, Any]) -> Flats:
        states = [state_of(self, tensor, group) for tensor in tensors]
        kinds = [kind for kind in states[0] if kind != "step"]
        gradients = [tensor.grad for tensor in tensors]
        return Flats(
            layout=self._layout(tensors),
            weights=[tensor.view(-1) for tensor in tensors],
            gradients=[gradient.view(-1) for gradient in gradients if gradient is not None],
            moments={kind: [state[kind].view(-1) for state in states] for kind in kinds},
            steps=[state["step"] for state in states],
        )

    def _layout(self, tensors: Sequence[torch.Tensor]) -> FlatLayout:
        key = tuple(id(tensor) for tensor in tensors)
        if key not in self._joined:
            each = [self._layouts.get(tensor) or FlatLayout.whole(tensor) for tensor in tensors]
            self._joined[key] = joined(each)
        return self._joined[key]


def update_by_adamw(flats: Flats, group: Mapping[str, Any]) -> None:
    """Update as torch's fused AdamW does (arXiv:1711.05101), by the same kernel; it knows no parameters."""
    kernels._fused_adamw_(
        flats.weights,
        flats.gradients,
        flats.moments["exp_avg"],
        flats.moments["exp_avg_sq"],
        [],
        flats.steps,
        **adamw_settings(group),
        lr=group["lr"],
    )


def adamw_settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """Collect what the fused kernel of AdamW is told beside tensors and learning rate."""
    beta1, beta2 = group["betas"]
    same = {"beta1": beta1, "beta2": beta2, "weight_decay": group["weight_decay"], "eps": group["eps"]}
    return {**same, "amsgrad": False, "maximize": False}
