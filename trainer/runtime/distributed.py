"""The process group: who we are, and how ranks agree.

Decisions travel over gloo as small CPU tensors, beside whatever moves the gradients, so that agreeing
never waits for the device.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from trainer.errors import MaskwrightError, UserError, mark_origin
from trainer.runtime.host_memory import keep_freed_memory
from trainer.runtime.process import node_name
from trainer.runtime.rendezvous import join_group

logger = logging.getLogger(__name__)
START_TIMEOUT = timedelta(minutes=30)
_CUDA_DEFAULTS = {
    # Blocks of several lengths, and numbers of documents, leave gaps in a cache of fixed segments.
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",  # end the process, and do not wait for communicators that may be stuck
    "TORCH_FR_BUFFER_SIZE": "2000",  # the last collectives of each rank, which a timeout writes out:
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
}


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    control: Any
    """gloo process group for decisions."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def device_name(self) -> str:
        """The model of the GPU, or "cpu"."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"


def start(timeout: timedelta = START_TIMEOUT, traces: Path | None = None) -> World:
    """Join the process group described by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.

    Args:
        timeout: of the meeting, and of each collective until `set_timeouts`.
        traces: folder for the last collectives of each rank, which NCCL writes when one of them does not end.

    Raises:
        UserError: on rank 0, when another process has the port; on every rank, when they have no GPU each.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    if cuda and torch.cuda.device_count() == 1:  # the scheduler shows each task its own device only
        local_rank = 0
        os.environ["LOCAL_RANK"] = "0"  # DeepSpeed reads it too
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        _set_defaults(traces)  # before the first use of the device, which reads them
        if local_rank < torch.cuda.device_count():  # else it is refused as soon as the ranks have met
            torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    join_group("nccl" if cuda else "gloo", rank, size, timeout)
    control = dist.new_group(backend="gloo", timeout=timeout) if cuda else dist.group.WORLD
    world = World(rank, size, local_rank, device, control)
    if (problem := device_problem(all_gather(world, _own_place(device)))) is not None:
        raise problem
    return world


def _set_defaults(traces: Path | None) -> None:
    """Set what torch reads from the environment on GPUs, where the user has not."""
    where = {} if traces is None else {"TORCH_FR_DUMP_TEMP_FILE": f"{traces}/nccl-trace-rank-"}  # and the rank
    for name, value in {**_CUDA_DEFAULTS, **where}.items():
        if name != "PYTORCH_ALLOC_CONF" or "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its older name
            os.environ.setdefault(name, value)


@dataclass(frozen=True)
class RankDevice:
    """Where a rank computes.

    Attributes:
        device: the identity of its GPU; empty when it has none.
        visible: the number of GPUs that it sees; 0 where ranks compute on the CPU.
        may_share: whether the GPU may be another rank's as well.
    """

    node: str
    device: str
    visible: int
    may_share: bool = False


def device_problem(places: Sequence[RankDevice]) -> UserError | None:
    """Say which ranks have no GPU of their own, before NCCL does in its way; None when all have, or on CPUs.

    Args:
        places: of all ranks, by rank.
    """
    for rank, place in enumerate(places):
        before = ((other.node, other.device) for other in places[:rank])
        same = next((number for number, each in enumerate(before) if each == (place.node, place.device)), None)
        if not place.visible or (place.device and (same is None or place.may_share)):
            continue
        has = f"the GPU of rank {same}" if place.device else "no GPU"
        ranks = sum(other.node == place.node for other in places)
        gpus = len({other.device for other in places if other.node == place.node and other.device})
        return UserError(
            f"Rank {rank} has {has}: {place.node} has {ranks} ranks and {gpus} GPU{'s' if gpus != 1 else ''} for them.",
            where="--nproc-per-node, or --ntasks-per-node of srun",
            remedy=f"Start one rank a GPU, here {gpus}. A global batch stays what it is. To train on the CPU instead, "
            'set CUDA_VISIBLE_DEVICES="".',
        )
    return None


def _own_place(device: torch.device) -> RankDevice:
    visible = torch.cuda.device_count() if device.type == "cuda" else 0
    if device.index is None or device.index >= visible:
        return RankDevice(node_name(), "", visible)
    # The UUID is that of a part of a GPU where it is divided (MIG). gloo does not care who shares one, and NCCL has a
    # variable by which a user says that it is meant.
    may_share = dist.get_backend() == "gloo" or os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1"
    return RankDevice(node_name(), str(torch.cuda.get_device_properties(device).uuid), visible, may_share)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def set_timeouts(decisions: timedelta, gradients: timedelta) -> None:
    """Set how long a collective may take from now on, in all groups, DeepSpeed's own included; every rank calls it.

    Args:
        decisions: over gloo.
        gradients: over NCCL.
    """
    if dist.is_initialized():
        groups = distributed_c10d._world.pg_map.items()
        for group, (backend, _) in groups:
            distributed_c10d._set_pg_timeout(gradients if backend == "nccl" else decisions, group)


def all_gather_floats(world: World, values: Sequence[float]) -> list[list[float]]:
    """Gather each rank's values, by rank: `all_gather` for some numbers, without pickling."""
    flat = [0.0] * (world.size * len(values))
    flat[world.rank * len(values) : (world.rank + 1) * len(values)] = values
    flat = all_reduce_sum(world, flat)
    return [flat[first : first + len(values)] for first in range(0, len(flat), len(values))]


def all_reduce_sum(world: World, values: Sequence[float]) -> list[float]:
    """Sum each value over all ranks, in float64."""
    if world.size == 1:
        return [float(value) for value in values]
    tensor = torch.tensor(list(values), dtype=torch.float64)
    dist.all_reduce(tensor, group=world.control)
    return tensor.tolist()


def broadcast_from_main(world: World, value: Any) -> Any:
    """Return rank 0's value, on every rank."""
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=world.control)
    return box[0]


def all_gather(world: World, value: Any) -> list[Any]:
    """Gather every rank's value, on every rank, in rank order."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value, group=world.control)
    return values


def gather_on_main(world: World, value: Any) -> list[Any] | None:
    """Gather every rank's value on rank 0, in rank order; None elsewhere."""
    if world.size == 1:
        return [value]
    values: list[Any] | None = [None] * world.size if world.is_main else None
    dist.gather_object(value, values, dst=0, group=world.control)
    return values


def raise_on_all_ranks(world: World, error: Exception | None) -> None:
    """Raise the error of the lowest failing rank on every rank, so that none waits for one that has left.

    On several machines an expected error says which one it is about, unless all ranks met one.
    """
    found = all_gather(world, (error, node_name()) if error is not None else None)
    for rank, each in enumerate(found):
        if each is None:
            continue
        first, node = each
        if isinstance(first, MaskwrightError) and None in found and _spans_nodes(world):
            first.where = f"{first.where}, on rank {rank} ({node})".removeprefix(", ")
        mark_origin(first, rank)
        raise first


def _spans_nodes(world: World) -> bool:
    return int(os.environ.get("LOCAL_WORLD_SIZE", world.size)) < world.size


def run_on_all_ranks(world: World, build: Callable[[], Any]) -> Any:
    """Build something on every rank; when a rank cannot, all raise its error."""
    value, error = None, None
    try:
        value = build()
    except Exception as caught:
        logger.exception("this rank cannot go on")
        error = caught
    raise_on_all_ranks(world, error)
    return value
