"""This rank's share of master weights and optimizer state, by parameter name: how each ZeRO stage lays it out.

Stage 0 keeps whole parameters. Stages 1 and 2 put the parameters of an optimizer group end to end and cut the whole
into one partition a rank, so that a cut may run through a parameter. Stage 3 cuts each parameter into equal parts.
All of these are fragments: consecutive elements of a flattened parameter.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
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
        frozen: names of the parameters that are kept as they are, which the optimizer does not know.
    """

    def __init__(
        self, module: torch.nn.Module, optimizer: Any, stage: int, rank: int, frozen: Collection[str] = ()
    ) -> None:
        self._names = {id(parameter): name for name, parameter in module.named_parameters()}
        self._frozen: list[Any] = [parameter for name, parameter in module.named_parameters() if name in frozen]
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

    def frozen_fragments(self) -> Iterator[Fragment]:
        """Yield what this rank holds of the frozen parameters: their weight alone, in the training precision."""
        for parameter in self._frozen:
            name = self._names[id(parameter)]
            if self._stage < 3:
                yield Fragment(name, 0, {WEIGHT: parameter.detach().view(-1)})
            elif length := self._part_length(parameter):
                yield Fragment(name, self._part_begin(parameter), {WEIGHT: parameter.ds_tensor.view(-1)[:length]})

    def set_updates(self, updates: Mapping[str, float]) -> None:
        """Set by parameter the number of updates that AdamW corrects its moments' bias for; of no name it is nought.

        What is updated as one tensor has had the same number (`build_optimizer`).
        """
        for tensor, parameters in zip(self.steps(), self._groups(), strict=True):
            tensor.fill_(max(updates.get(self._names[id(parameter)], 0.0) for parameter in parameters))

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

    def _groups(self) -> list[Sequence[Any]]:
        """List the parameters that each of the tensors holds."""
        if self._stage == 0:
            return [[parameter] for parameter in self._masters()]
        if self._stage == 3:
            return list(self._optimizer.fp16_groups)
        return list(getattr(self._optimizer, "bf16_groups", None) or self._optimizer.bit16_groups)

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
        for master, group in zip(self._masters(), self._groups(), strict=True):
            for parameter in group:
                mapping = parameter._hp_mapping
                if mapping is not None:  # else other ranks have all of it
                    begin, place = mapping.lp_fragment_address.start, mapping.hp_fragment_address
                    yield self._slice(self._names[id(parameter)], begin, master, place.start, place.numel)

    def _even_parts(self) -> Iterator[Fragment]:
        for master, group in zip(self._masters(), self._groups(), strict=True):
            start = 0
            for parameter in group:
                if length := self._part_length(parameter):
                    name = self._names[id(parameter)]
                    yield self._slice(name, self._part_begin(parameter), master, start, length)
                start += parameter.partition_numel()

    def _part_begin(self, parameter: Any) -> int:
        """Find the first element of this rank's part of a parameter of stage 3; past its end, where it has none."""
        return min(self._rank * parameter.partition_numel(), parameter.ds_numel)

    def _part_length(self, parameter: Any) -> int:
        """Count the elements of this rank's part, without what pads it."""
        return min(parameter.partition_numel(), parameter.ds_numel - self._part_begin(parameter))

    def _slice(self, name: str, begin: int, master: torch.Tensor, start: int, length: int) -> Fragment:
        tensors = {WEIGHT: master.detach(), **{kind: self._state(master)[kind] for kind in MOMENTS}}
        return Fragment(name, begin, {kind: flat[start : start + length] for kind, flat in tensors.items()})
