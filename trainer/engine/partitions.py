"""This rank's share of master weights and optimizer state, by parameter name: how each ZeRO stage lays it out.

Stage 0 keeps whole parameters. Stages 1 and 2 put the parameters of an optimizer group end to end and cut the whole
into one partition a rank, so that a cut may run through a parameter. Stage 3 cuts each parameter into equal parts.
All of these are fragments: consecutive elements of a flattened parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trainer.engine.state_layout import FlatLayout, Piece

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's; of a matrix of Muon there is the first alone."""
ONE_MOMENT = "maskwright_one_moment"
"""Marks the groups of an optimizer that have the first of MOMENTS alone."""
PARAMETER_NAMES = "maskwright_parameter_names"  # in stage 0's model file: a list of names for each optimizer group


def state_of(optimizer: torch.optim.Optimizer, tensor: torch.Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of a tensor that an optimizer updates; where there is none yet, make it: no step, no moment.

    Returns:
        by name `step`, fp32 [], and its moments, in the tensor's shape.
    """
    state = optimizer.state[tensor]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
        kinds = MOMENTS[:1] if group.get(ONE_MOMENT) else MOMENTS
        state.update({kind: torch.zeros_like(tensor, requires_grad=False) for kind in kinds})
    return state


@dataclass(frozen=True)
class Fragment:
    """Consecutive elements of a parameter, as views: to write into them is to change the training state.

    Attributes:
        begin: place of the first element in the flattened parameter.
        tensors: by kind (WEIGHT, and those of MOMENTS that it has) fp32 [n].
    """

    name: str
    begin: int
    tensors: dict[str, torch.Tensor]


class Partitions:
    """The training state of one rank under DeepSpeed.

    Optimizer state that does not exist yet, because no step was made, is created.

    Args:
        optimizer: DeepSpeed's wrapper, or at stage 0 what it wraps elsewhere.
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
        for number, (master, parameters) in enumerate(zip(self._masters(), self._groups(), strict=True)):
            kinds = {WEIGHT: master.detach(), **self._moments(number, master)}
            flats = {kind: tensor.view(-1) for kind, tensor in kinds.items()}
            for name, begin, start, length in self._held(parameters):
                yield Fragment(name, begin, {kind: flat[start : start + length] for kind, flat in flats.items()})

    def layouts(self, gather: Callable[[Any], list[Any]]) -> dict[torch.Tensor, FlatLayout]:
        """Describe by tensor that the optimizer updates what lies in it, here and on the other ranks; a collective.

        Args:
            gather: collects a value of each rank, by rank.
        """
        held = gather([list(self._held(parameters)) for parameters in self._groups()])
        found = {}
        for number, (master, parameters) in enumerate(zip(self._masters(), self._groups(), strict=True)):
            numbers = {self._names[id(parameter)]: place for place, parameter in enumerate(parameters)}
            pieces = (
                Piece(numbers[name], rank, 0, begin, start, length)
                for rank, of_rank in enumerate(held)
                for name, begin, start, length in of_rank[number]
            )
            shapes = tuple(tuple(getattr(parameter, "ds_shape", parameter.shape)) for parameter in parameters)
            found[master] = FlatLayout(shapes, tuple(sorted(pieces, key=lambda piece: (piece.parameter, piece.rank))))
        return found

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
        return [self._state(number, master)["step"] for number, master in enumerate(self._masters())]

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
        """List the tensors that the optimizer updates."""
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

    def _state(self, number: int, master: torch.Tensor) -> dict[str, Any]:
        """Return the optimizer's state of its tensor of a number."""
        optimizer = self._optimizer if self._stage == 0 else self._optimizer.optimizer
        groups: list[dict[str, Any]] = optimizer.param_groups
        if self._stage == 0:
            own = [group for group in groups for _ in group["params"]]
        elif self._stage == 3:
            own = [groups[place] for _, place in sorted(self._optimizer.sub_group_to_group_id.items())]
        else:
            own = groups
        return state_of(optimizer, master, own[number])

    def _moments(self, number: int, master: torch.Tensor) -> dict[str, torch.Tensor]:
        state = self._state(number, master)
        return {kind: state[kind] for kind in MOMENTS if kind in state}

    def _held(self, parameters: Sequence[Any]) -> Iterator[tuple[str, int, int, int]]:
        """Find what this rank has of the parameters of one tensor: name, begin in the parameter, in the tensor, length.

        Stages 0 to 2 leave no room between them, and stage 3 pads each.
        """
        start = 0
        for parameter in parameters:
            name = self._names[id(parameter)]
            if self._stage == 0:
                yield name, 0, 0, parameter.numel()
            elif self._stage == 3:
                if length := self._part_length(parameter):
                    yield name, self._part_begin(parameter), start, length
                start += parameter.partition_numel()
            elif parameter._hp_mapping is not None:  # else other ranks have all of it
                place = parameter._hp_mapping.hp_fragment_address
                yield name, parameter._hp_mapping.lp_fragment_address.start, place.start, place.numel

    def _part_begin(self, parameter: Any) -> int:
        """Find the first element of this rank's part of a parameter of stage 3; past its end, where it has none."""
        return min(self._rank * parameter.partition_numel(), parameter.ds_numel)

    def _part_length(self, parameter: Any) -> int:
        """Count the elements of this rank's part, without what pads it."""
        return min(parameter.partition_numel(), parameter.ds_numel - self._part_begin(parameter))
