"""What one rank holds at each ZeRO stage, and what its checkpoint takes: arithmetic on sizes.

As DeepSpeed 0.19.8 lays it out, read off its live tensors at every stage (tests/distributed/test_plan_memory.py
compares with the memory of real ranks). With N parameters, w ranks, P = N / w and b bytes for a weight in the training
precision:

| stage | weights | optimizer | gradients in a pass | in an update, beside weights and optimizer |
|---|---|---|---|---|
| 0 (fp32) | 4N | 8N | 4N | gradients, and once more flat while they are reduced |
| 1 | bN | 12P | bN while they accumulate, else bP | bP twice; in half precision 4P more, the same in fp32 |
| 2 | bN | 12P | bP, twice while they accumulate | as at stage 1 |
| 3 | bP, and bN gathered | 12P | bP | as at stage 1; no weights are gathered |

Frozen weights, F of them, take bF at stages 0 to 2, and bF / w and bF gathered at stage 3. Rank 0 keeps 4F in the
host's memory; in fp32 at stages 0 to 2 on CPU those are the weights themselves.

Beside these, buckets: what is reduced at stages 1 to 3, and at stage 3 what weights arrive in.

Muon has 4 bytes less for an element of its matrices, and the optimizers of our own work in memory of their own
(`trainer.sizing.update_memory`).

The activations of a pass come from `trainer.sizing.meta_trace`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

from trainer.config import TrainConfig
from trainer.engine.state_size import MOMENT_BYTES, OPTIMIZER_BYTES, WEIGHT_BYTES
from trainer.sizing.update_memory import ADAMW, OptimizerSizes

"""Of a parameter in a training precision."""
GPU_SHARE = 0.9
"""Of a GPU's memory, for torch's tensors: fragmentation, NCCL's buffers and kernels' workspaces come on top."""
CPU_SHARE = 0.5
"""Of a machine's available memory, for tensors: the heap keeps what is freed and so holds up to twice as much."""
FLATTENED_AT_ONCE = 500_000_000  # elements: how much stage 0 reduces in one piece


@dataclass(frozen=True)
class ZeroSettings:
    """The settings of DeepSpeed's `zero_optimization` that memory and traffic depend on, its defaults filled in.

    Sizes are in elements.
    """

    stage: int
    reduce_bucket_size: int
    buckets: int
    prefetch_bucket_size: int
    param_persistence_threshold: int
    max_reuse_distance: int
    offloads_optimizer: bool
    offloads_weights: bool

    @classmethod
    def of(cls, preset: dict[str, Any]) -> ZeroSettings:
        zero = preset["zero_optimization"]
        stage = zero["stage"]
        overlaps = zero.get("overlap_comm")
        overlaps = stage == 3 if overlaps is None else bool(overlaps)
        contiguous = stage == 3 or zero.get("contiguous_gradients", True)
        return cls(
            stage=stage,
            reduce_bucket_size=int(zero.get("reduce_bucket_size", 5e8)),
            buckets=(2 if overlaps and stage in (1, 2) else 1) if contiguous and stage else 0,
            prefetch_bucket_size=int(zero.get("prefetch_bucket_size", 5e7)),
            param_persistence_threshold=int(zero.get("param_persistence_threshold", 1e5)),
            max_reuse_distance=int(zero.get("max_reuse_distance", 1e9)),
            offloads_optimizer=zero.get("offload_optimizer", {}).get("device", "none") == "cpu",
            offloads_weights=zero.get("offload_param", {}).get("device", "none") == "cpu",
        )


class PassPeaks(Protocol):
    """Bytes of a forward and backward pass beyond the weights, at its peak; each is found out when it is asked for."""

    @property
    def activations(self) -> int:
        """Without gradients, each of which is taken away as it comes."""
        ...

    @property
    def with_gradients(self) -> int:
        """Gradients included, in a pass that makes them."""
        ...

    @property
    def adding(self) -> int:
        """Gradients included, in a pass that adds to those of an earlier one."""
        ...


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank in a steady step.

    Attributes:
        weights, optimizer, gradients, buckets, activations: what is there at the peak of a forward and backward pass.
        update: all that is there at the peak of an update of the weights.
        host: what is offloaded to the host's memory.
    """

    weights: int
    optimizer: int
    gradients: int
    buckets: int
    activations: int
    update: int
    host: int = 0

    @property
    def peak(self) -> int:
        return max(self.weights + self.optimizer + self.gradients + self.buckets + self.activations, self.update)


@dataclass(frozen=True)
class _Bytes:
    """What the stages' memory is put together from, in bytes."""

    whole: int
    """All weights in the training precision."""
    part: int
    """This rank's share of them."""
    masters: int
    """This rank's share of master weights and moments, in fp32."""
    own_gradients: int
    """This rank's share of the gradients, as they are added up."""
    bucket: int
    """What is reduced at once, in all buckets."""
    update: int
    """Working memory of an update at stages 1 to 3."""


def rank_memory(
    parameters: int,
    world_size: int,
    accumulation: int,
    train: TrainConfig,
    zero: ZeroSettings,
    passes: PassPeaks,
    on_cpu: bool = False,
    frozen: int = 0,
    optimizer: OptimizerSizes = ADAMW,
) -> RankMemory:
    """Compute the memory of a rank, of rank 0 where they differ.

    Args:
        parameters: elements of all trained parameters, tied ones once.
        accumulation: micro-batches a step.
        on_cpu: memory that is allocated and not yet written takes no room there, so a bucket grows as gradients come.
        frozen: elements of all parameters that have neither gradient nor optimizer state.
        optimizer: where it is not AdamW.
    """
    share, weight = -(-parameters // world_size), WEIGHT_BYTES[train.precision]
    adds_in_fp32 = train.gradient_accumulation_dtype == "fp32"
    bucket = weight * zero.buckets * zero.reduce_bucket_size
    sizes = _Bytes(
        whole=weight * parameters,
        part=weight * share,
        masters=OPTIMIZER_BYTES * share - MOMENT_BYTES * (optimizer.one_moment // world_size),
        own_gradients=(4 if adds_in_fp32 else weight) * share,
        bucket=min(bucket, weight * parameters) if on_cpu else bucket,
        update=2 * weight * share + (0 if weight == 4 else 4 * share),
    )
    accumulates = accumulation > 1
    if zero.stage == 0:
        memory = _stage_0(sizes, passes, accumulates, parameters, optimizer)
    elif zero.stage == 1 and adds_in_fp32:
        memory = _stage_1_in_fp32(sizes, passes, accumulates, parameters)
    elif zero.stage == 1:
        memory = _stage_1(sizes, passes, accumulates, on_cpu)
    elif zero.stage == 2:
        memory = _stage_2(sizes, passes, accumulates, on_cpu, twice=accumulates and not adds_in_fp32)
    else:
        memory = _stage_3(sizes, passes, weight * min(parameters + frozen, zero.prefetch_bucket_size))
    frozen_share = -(-frozen // world_size)
    if zero.stage == 3:  # gathered in a pass as well, and not in an update
        gathered = weight * frozen
        weights = memory.weights + gathered + weight * frozen_share
        memory = replace(memory, weights=weights, update=memory.update - gathered)
    else:
        memory = replace(memory, weights=memory.weights + weight * frozen)
    memory = _with_offload(memory, zero, share, share + frozen_share, weight)
    if zero.stage:  # stage 0 has let go of its flat gradients by then
        memory = replace(memory, update=memory.update + optimizer.workspace)
    unrounded = 4 * frozen if on_cpu and (weight < 4 or zero.stage == 3) else 0
    return replace(memory, weights=memory.weights + unrounded, update=memory.update + unrounded)


def _stage_0(
    sizes: _Bytes, passes: PassPeaks, accumulates: bool, parameters: int, optimizer: OptimizerSizes
) -> RankMemory:
    in_pass = passes.adding if accumulates else passes.with_gradients
    flat = sizes.whole // parameters * min(parameters, FLATTENED_AT_ONCE)
    return RankMemory(
        weights=sizes.whole,
        optimizer=2 * MOMENT_BYTES * parameters - MOMENT_BYTES * optimizer.one_moment,
        gradients=sizes.whole,
        buckets=0,
        activations=max(0, in_pass - sizes.whole),
        update=sizes.whole + max(flat, optimizer.workspace),
    )


def _stage_1_in_fp32(sizes: _Bytes, passes: PassPeaks, accumulates: bool, parameters: int) -> RankMemory:
    """Count what DeepSpeed's BF16_Optimizer holds: all gradients in fp32 as well, reduced as a flat copy in bf16."""
    in_pass = passes.adding if accumulates else passes.with_gradients
    gradients = sizes.whole + 4 * parameters
    return RankMemory(
        weights=sizes.whole,
        optimizer=sizes.masters,
        gradients=gradients,
        buckets=0,
        activations=max(0, in_pass - sizes.whole),
        update=2 * gradients,
    )


def _stage_1(sizes: _Bytes, passes: PassPeaks, accumulates: bool, on_cpu: bool) -> RankMemory:
    if accumulates:
        gradients, activations = sizes.whole, max(0, passes.adding - sizes.whole)
    elif on_cpu:
        gradients, activations = 0, passes.with_gradients
    else:
        gradients, activations = sizes.own_gradients, passes.activations
    return _partitioned(sizes, gradients, activations, kept=0, on_cpu=on_cpu)


def _stage_2(sizes: _Bytes, passes: PassPeaks, accumulates: bool, on_cpu: bool, twice: bool) -> RankMemory:
    kept = sizes.own_gradients if accumulates else 0  # of earlier micro-batches
    if on_cpu:
        gradients, activations = kept, passes.with_gradients
    else:
        gradients, activations = sizes.own_gradients * (2 if twice else 1), passes.activations
    return _partitioned(sizes, gradients, activations, kept=kept, on_cpu=on_cpu)


def _partitioned(sizes: _Bytes, gradients: int, activations: int, kept: int, on_cpu: bool) -> RankMemory:
    return RankMemory(
        weights=sizes.whole,
        optimizer=sizes.masters,
        gradients=gradients,
        buckets=0 if on_cpu else sizes.bucket,
        activations=activations,
        # At the end of a pass there are the last bucket and, while it is reduced, a copy.
        update=max(sizes.update, kept + 2 * sizes.bucket),
    )


def _stage_3(sizes: _Bytes, passes: PassPeaks, arriving: int) -> RankMemory:
    return RankMemory(
        weights=sizes.whole + sizes.part,
        optimizer=sizes.masters,
        gradients=sizes.own_gradients,
        buckets=sizes.bucket + arriving,
        activations=passes.activations,
        # No weights are gathered then.
        update=sizes.update + sizes.own_gradients + sizes.bucket - sizes.part - sizes.whole,
    )


def _with_offload(memory: RankMemory, zero: ZeroSettings, part: int, weights_part: int, weight: int) -> RankMemory:
    """Move what is offloaded to the host; `memory.update` is made the total there.

    Args:
        part: elements of the trained weights that are this rank's.
        weights_part: of all weights.
    """
    optimizer, gradients, weights, host, update = memory.optimizer, memory.gradients, memory.weights, 0, memory.update
    if zero.offloads_optimizer:
        # DeepSpeed keeps there, beside the state, its gradients in fp32 and what the new weights are copied from.
        host += optimizer + (4 + weight) * part
        optimizer, gradients, update = 0, 0, 0
    if zero.offloads_weights:
        host, weights = host + weight * weights_part, weights - weight * weights_part
    return replace(
        memory,
        optimizer=optimizer,
        gradients=gradients,
        weights=weights,
        host=host,
        update=weights + optimizer + update,
    )
