"""This rank's share of master weights and optimizer state, by parameter name: how each ZeRO stage lays it out.

Stage 0 keeps whole parameters. Stages 1 and 2 put the parameters of an optimizer group end to end and cut the whole
into one partition a rank, so that a cut may run through a parameter. Stage 3 cuts each parameter into equal parts.
All of these are fragments: consecutive elements of a flattened parameter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
PARAMETER_NAMES = "maskwright_parameter_names"  # in stage 0's model file: a list of names for each optimizer group


@dataclass(frozen=True)
class Fragment:
    """Consecutive elements of a parameter, as views: to write into them is to change the training state.

    Attributes:
        begin: place of the first element in the flattened parameter.
        tensors: by kind (WEIGHT, and each of MOMENTS) fp32 [n].
    """

    name: str
    begin: int
    tensors: dict[str, torch.Tensor]


class Partitions:
    """The training state of one rank under DeepSpeed.

    Optimizer state that does not exist yet, because no step was made, is created.

    Args:
        optimizer: DeepSpeed's wrapper, or at stage 0 torch's AdamW itself.
    """

    def __init__(self, module: torch.nn.Module, optimizer: Any, stage: int, rank: int) -> None:
        self._names = {id(parameter): name for name, parameter in module.named_parameters()}
        self._optimizer = optimizer
        self._stage = stage
        self._rank = rank

    def fragments(self) -> Iterator[Fragment]:
        """Yield all fragments that this rank updates, whose order is of no importance."""
        if self._stage == 0:
            yield from self._whole_parameters()
        elif self._stage == 3:
            yield from self._even_parts()
        else:
            yield from self._cut_groups()

    def set_step(self, step: float) -> None:
        """Set the number of updates that AdamW corrects its moments' bias for."""
        for tensor in self.steps():
            tensor.fill_(step)

    def steps(self) -> list[torch.Tensor]:
        """Return AdamW's own counts of updates, one for each tensor that it updates: fp32 []."""
        return [self._state(master)["step"] for master in self._masters()]

    @torch.no_grad()
    def refresh_forward_weights(self) -> None:
        """Copy the master weights to those that the forward pass uses; a collective."""
        if self._stage in (1, 2):
            self._optimizer.update_lp_params()
        elif self._stage == 3:
            # What the end of a step does.
            self._optimizer.checkpoint_event_prologue()
            for number in range(len(self._optimizer.fp16_groups)):
                self._optimizer._reassign_or_swap_out_partitioned_parameters(number)
            self._optimizer.checkpoint_event_epilogue()

    def _masters(self) -> list[torch.Tensor]:
        """List the tensors that torch's AdamW updates."""
        if self._stage == 0:
            return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        if self._stage == 3:
            return list(self._optimizer.fp32_partitioned_groups_flat)
        bf16_optimizer = hasattr(self._optimizer, "fp32_groups_flat_partition")
        partitions = "fp32_groups_flat_partition" if bf16_optimizer else "single_partition_of_fp32_groups"
        return list(getattr(self._optimizer, partitions))

    def _state(self, master: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return AdamW's state of a tensor; where there is none yet, make it as its first step does."""
        adamw = self._optimizer if self._stage == 0 else self._optimizer.optimizer
        state = adamw.state[master]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
            state.update({kind: torch.zeros_like(master, requires_grad=False) for kind in MOMENTS})
        return state

    def _whole_parameters(self) -> Iterator[Fragment]:
        for parameter in self._masters():
            views = {WEIGHT: parameter.detach(), **{kind: self._state(parameter)[kind] for kind in MOMENTS}}
            yield Fragment(self._names[id(parameter)], 0, {kind: view.view(-1) for kind, view in views.items()})

    def _cut_groups(self) -> Iterator[Fragment]:
        masters, bf16_groups = self._masters(), getattr(self._optimizer, "bf16_groups", None)
        for master, group in zip(masters, bf16_groups or self._optimizer.bit16_groups, strict=True):
            for parameter in group:
                mapping = parameter._hp_mapping
                if mapping is not None:  # else other ranks have all of it
                    begin, place = mapping.lp_fragment_address.start, mapping.hp_fragment_address
                    yield self._slice(self._names[id(parameter)], begin, master, place.start, place.numel)

    def _even_parts(self) -> Iterator[Fragment]:
        for master, group in zip(self._masters(), self._optimizer.fp16_groups, strict=True):
            start = 0
            for parameter in group:
                part = parameter.partition_numel()
                begin = min(self._rank * part, parameter.ds_numel)
                if length := min(part, parameter.ds_numel - begin):
                    yield self._slice(self._names[id(parameter)], begin, master, start, length)
                start += part

    def _slice(self, name: str, begin: int, master: torch.Tensor, start: int, length: int) -> Fragment:
        tensors = {WEIGHT: master.detach(), **{kind: self._state(master)[kind] for kind in MOMENTS}}
        return Fragment(name, begin, {kind: flat[start : start + length] for kind, flat in tensors.items()})
