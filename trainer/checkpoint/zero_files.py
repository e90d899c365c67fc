"""Read the files of a ZeRO checkpoint by parameter, whatever stage and number of ranks wrote them.

Each optimizer file holds flat tensors in which fragments of parameters lie end to end. The index says where; the
files are mapped into memory, so that reading a fragment touches its own bytes and no others, and they are opened
without running anything that may be in them (`safe_load`).

    stage 0     one file, parameters whole
    stage 1, 2  a file a rank; DeepSpeed records the places, and a parameter's fragments lie in the order of the ranks
    stage 3     a file a rank; each parameter is cut evenly, the last part padded

Weights that were not trained are in none of these; they lie whole, in fp32, in a file of their own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from trainer.checkpoint.manifest import FROZEN
from trainer.checkpoint.safe_load import LossScalerState, load_without_code
from trainer.engine.partitions import MOMENTS, PARAMETER_NAMES, WEIGHT
from trainer.errors import DamagedError

MODEL_FILE = "mp_rank_00_model_states.pt"
_Method = TypeVar("_Method", bound=Callable[..., Any])
_SHOWN_CHARACTERS = 200
_OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt$")


@dataclass(frozen=True)
class FragmentPlace:
    """Where a fragment lies: elements [start, start + length) of a flat tensor of a rank's file.

    Attributes:
        begin: place of its first element in the flattened parameter.
        flat: number of the flat tensor in the file.
    """

    name: str
    begin: int
    rank: int
    flat: int
    start: int
    length: int


@dataclass(frozen=True)
class _Opened:
    """The content of one optimizer file: its flat tensors, by kind, and the updates that each has had.

    Moments and updates are missing of a run without a step and, at stage 0, of what never had a gradient.
    """

    flats: list[dict[str, torch.Tensor]]
    steps: list[float | None]
    loss_scaler: LossScalerState | None = None


def _explained(method: _Method) -> _Method:
    """Let a method raise DamagedError where a file does not hold what DeepSpeed writes into it."""

    @wraps(method)
    def explained(self: ZeroFiles, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            problem = f"{type(error).__name__}: {error}"[:_SHOWN_CHARACTERS]
            raise self._unreadable(f"its files do not hold what DeepSpeed writes ({problem})") from error

    return cast(_Method, explained)


class ZeroFiles:
    """A checkpoint's weights and optimizer state by parameter.

    Args:
        places: of all ranks' files (`index`); default: read now.
    """

    def __init__(self, folder: Path, places: Iterable[Sequence[FragmentPlace]] | None = None) -> None:
        self.folder = folder
        self._opened: dict[int, _Opened] = {}
        self._places: dict[str, list[FragmentPlace]] = {}
        found = [self.index(rank) for rank in range(self.ranks)] if places is None else places
        for place in sorted((place for part in found for place in part), key=lambda place: place.rank):
            self._add(place)
        if self._places:
            self._check_complete()

    @cached_property
    def stage(self) -> int:
        """ZeRO stage that wrote it; 1 stands for 2 as well, whose files are the same."""
        if not self._optimizer_files:
            return 0
        return 1 if (self.folder / MODEL_FILE).exists() else 3

    @property
    def ranks(self) -> int:
        """How many files there are with optimizer state."""
        return max(1, len(self._optimizer_files))

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """The shape of each parameter, trained or frozen."""
        return {**self.trained, **{name: weight.shape for name, weight in self.frozen.items()}}

    @cached_property
    def frozen(self) -> dict[str, torch.Tensor]:
        """The parameters that were not trained, fp32, mapped from their file."""
        try:
            return load_file(self.folder / FROZEN) if (self.folder / FROZEN).exists() else {}
        except (SafetensorError, OSError, ValueError) as error:
            raise self._unreadable(f"{FROZEN}: {error}") from error

    @cached_property
    @_explained
    def trained(self) -> dict[str, torch.Size]:
        """The shape of each trained parameter, in the order of the files."""
        if self.stage == 0:
            names = [name for group in self._model_state[PARAMETER_NAMES] for name in group]
            return {name: self._model_state["module"][name].shape for name in names}
        return {name: torch.Size(shape) for group in self._model_state["param_shapes"] for name, shape in group.items()}

    @property
    @_explained
    def buffers(self) -> dict[str, torch.Tensor]:
        """Tensors of the module's state that are not trained, such as running statistics."""
        return {name: self._model_state["module"][name] for name in self._model_state["buffer_names"]}

    @property
    @_explained
    def loss_scaler(self) -> dict[str, Any]:
        """The values of DeepSpeed's loss scaler, by attribute; none where there was none."""
        return vars(self._open(0).loss_scaler or LossScalerState())

    @property
    @_explained
    def counters(self) -> dict[str, int]:
        """DeepSpeed's own counters."""
        return {name: self._model_state[name] for name in ("global_steps", "global_samples", "skipped_steps")}

    @property
    def adam_step(self) -> float:
        """Number of updates that AdamW has made; 0 when there was none."""
        return max(self.updates.values(), default=0.0)

    @cached_property
    @_explained
    def updates(self) -> dict[str, float]:
        """How many updates each trained parameter has had: fewer than others, where it was frozen before.

        What never had a gradient counts as those that were updated most.
        """
        if self.stage == 1:  # a flat tensor is a group, of which rank 0 may hold a part only
            groups = self._model_state["param_shapes"]
            flats = {name: number for number, group in enumerate(groups) for name in group}
        else:
            flats = {place.name: place.flat for place in self.index(0)}
        steps = self._open(0).steps
        most = max((step for step in steps if step is not None), default=0.0)
        return {name: most if (step := steps[flat]) is None else step for name, flat in flats.items()}

    @_explained
    def index(self, rank: int) -> list[FragmentPlace]:
        """Find where fragments lie in a rank's file; `begin` of stages 1 and 2 is found when all are put together."""
        if self.stage == 0:
            names = [name for group in self._model_state[PARAMETER_NAMES] for name in group]
            return [FragmentPlace(name, 0, 0, flat, 0, self.trained[name].numel()) for flat, name in enumerate(names)]
        if self.stage == 3:
            return self._index_even_parts(rank)
        mappings = self._load(self._optimizer_files[rank])["optimizer_state_dict"]["param_slice_mappings"]
        return [
            FragmentPlace(name, -1, rank, flat, place.start, place.numel)
            for flat, mapping in enumerate(mappings)
            for name, place in mapping.items()
        ]

    @torch.no_grad()
    @_explained
    def read_into(self, name: str, begin: int, target: torch.Tensor, kind: str = WEIGHT) -> None:
        """Copy elements [begin, begin + n) of a flattened parameter, or of one of its moments, to `target` [n].

        Raises:
            DamagedError: when the checkpoint holds no such parameter.
        """
        end = begin + target.numel()
        if name not in self.shapes or end > self.shapes[name].numel():
            raise self._unreadable(f"it holds no {name} of at least {end:,} elements")
        if name in self.frozen:
            target.copy_(self.frozen[name].view(-1)[begin:end]) if kind == WEIGHT else target.zero_()
            return
        for place in self._places[name]:
            first, last = max(begin, place.begin), min(end, place.begin + place.length)
            if first >= last:
                continue
            flat = self._open(place.rank).flats[place.flat].get(kind)
            part = target[first - begin : last - begin]
            if flat is None:
                part.zero_()  # moments before the first update
            else:
                offset = place.start + first - place.begin
                part.copy_(flat[offset : offset + last - first])

    def read_weight(self, name: str) -> torch.Tensor:
        """Read a whole parameter, fp32, in its shape."""
        weight = torch.empty(self.shapes[name].numel())
        self.read_into(name, 0, weight)
        return weight.view(self.shapes[name])

    def _add(self, place: FragmentPlace) -> None:
        before = self._places.setdefault(place.name, [])
        if place.begin < 0:
            begin = before[-1].begin + before[-1].length if before else 0
            place = FragmentPlace(place.name, begin, place.rank, place.flat, place.start, place.length)
        before.append(place)

    def _check_complete(self) -> None:
        for name, shape in self.trained.items():
            length = sum(place.length for place in self._places.get(name, ()))
            if length != shape.numel():
                raise self._unreadable(f"{length:,} of {shape.numel():,} elements of {name} are there")

    def _index_even_parts(self, rank: int) -> list[FragmentPlace]:
        places, flat, start = [], 0, 0
        lengths = [weights[WEIGHT].numel() for weights in self._open(rank).flats]
        for name, shape in self.trained.items():
            part = -(-shape.numel() // self.ranks)
            if start + part > lengths[flat]:
                flat, start = flat + 1, 0
            begin = min(rank * part, shape.numel())
            if length := min(part, shape.numel() - begin):
                places.append(FragmentPlace(name, begin, rank, flat, start, length))
            start += part
        return places

    @cached_property
    def _optimizer_files(self) -> list[Path]:
        """In the order of the ranks."""
        found = {int(match[1]): path for path in self.folder.iterdir() if (match := _OPTIMIZER_FILE.match(path.name))}
        if sorted(found) != list(range(len(found))):
            raise self._unreadable(f"there are optimizer files of the ranks {sorted(found)} only")
        return [found[rank] for rank in range(len(found))]

    @cached_property
    def _model_state(self) -> dict[str, Any]:
        name = MODEL_FILE if self.stage < 3 else f"zero_pp_rank_0_{MODEL_FILE}"
        return self._load(self.folder / name)

    def _open(self, rank: int) -> _Opened:
        if rank not in self._opened:
            self._opened[rank] = self._read_parameters() if self.stage == 0 else self._read_flats(rank)
        return self._opened[rank]

    def _read_parameters(self) -> _Opened:
        states, numbers = self._model_state["optimizer"]["state"], range(len(self.trained))
        names = list(self.trained)
        weights = [self._model_state["module"][name] for name in names]
        moments = [states.get(number, {}) for number in numbers]
        return _Opened(
            [_flat_tensors(weight, moment) for weight, moment in zip(weights, moments, strict=True)],
            [float(moment["step"]) if moment else None for moment in moments],
        )

    def _read_flats(self, rank: int) -> _Opened:
        saved = self._load(self._optimizer_files[rank])["optimizer_state_dict"]
        weights = saved["fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"]
        states = saved["optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"]["state"]
        moments = [states.get(number, {}) for number in range(len(weights))]
        return _Opened(
            [_flat_tensors(weight, moment) for weight, moment in zip(weights, moments, strict=True)],
            [float(moment["step"]) if moment else None for moment in moments],
            saved.get("loss_scaler"),
        )

    def _load(self, path: Path) -> dict[str, Any]:
        try:
            return load_without_code(path)
        except FileNotFoundError:
            raise self._unreadable(f"{path.name} is missing") from None
        except ValueError as error:
            raise self._unreadable(f"{path.name}: {error}") from error

    def _unreadable(self, problem: str) -> DamagedError:
        return DamagedError(
            f"Checkpoint {self.folder.name} cannot be read: {problem}.",
            where=str(self.folder),
            remedy="Use another one: `maskwright checkpoint list RUN` shows them.",
        )


def _flat_tensors(weight: torch.Tensor, moments: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tensors = {WEIGHT: weight, **{kind: moments[kind] for kind in MOMENTS if kind in moments}}
    return {kind: tensor.view(-1) for kind, tensor in tensors.items()}
