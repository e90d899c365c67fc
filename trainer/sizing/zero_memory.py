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

Beside these, buckets: what is reduced at stages 1 to 3, and at stage 3 what weights arrive in.

The activations of a pass come from `trainer.sizing.meta_trace`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

from trainer.config import TrainConfig
from trainer.engine.state_size import OPTIMIZER_BYTES, WEIGHT_BYTES

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


def rank_memory(
    parameters: int,
    world_size: int,
    accumulation: int,
    train: TrainConfig,
    zero: ZeroSettings,
    passes: PassPeaks,
    on_cpu: bool = False,
) -> RankMemory:
    """Compute the memory of a rank.

    Args:
        parameters: elements of all trained parameters, tied ones once.
        accumulation: micro-batches a step.
        on_cpu: memory that is allocated and not yet written takes no room there, so a bucket grows as gradients come.
    """
    part, weight = -(-parameters // world_size), WEIGHT_BYTES[train.precision]
    whole = weight * parameters
    fp32_gradients = train.gradient_accumulation_dtype == "fp32"
    accumulates = accumulation > 1
    bucket = weight * zero.buckets * zero.reduce_bucket_size
    bucket = min(bucket, whole) if on_cpu else bucket
    own_gradients = (4 if fp32_gradients else weight) * part
    in_update = 2 * weight * part + (0 if weight == 4 else 4 * part)
    if zero.stage == 0:
        with_gradients = passes.adding if accumulates else passes.with_gradients
        flat = weight * min(parameters, FLATTENED_AT_ONCE)
        memory = RankMemory(whole, 8 * parameters, whole, 0, max(0, with_gradients - whole), whole + flat)
    elif zero.stage == 1 and fp32_gradients:
        # DeepSpeed's BF16_Optimizer keeps all gradients in fp32 as well, and reduces them as a flat copy in bf16.
        with_gradients = passes.adding if accumulates else passes.with_gradients
        flat = (weight + 4) * parameters
        gradients = whole + 4 * parameters
        activations = max(0, with_gradients - whole)
        memory = RankMemory(whole, OPTIMIZER_BYTES * part, gradients, 0, activations, gradients + flat)
    elif zero.stage in (1, 2):
        kept = own_gradients if zero.stage == 2 and accumulates else 0  # of earlier micro-batches
        if zero.stage == 1 and accumulates:
            gradients, of_pass = whole, max(0, passes.adding - whole)
        elif on_cpu:
            gradients, of_pass = kept, passes.with_gradients
        else:
            gradients = own_gradients * (2 if kept and not fp32_gradients else 1)
            of_pass = passes.activations
        # At the end of a pass there are the last bucket and, while it is reduced, a copy.
        in_update = max(in_update, kept + 2 * bucket)
        memory = RankMemory(whole, OPTIMIZER_BYTES * part, gradients, 0 if on_cpu else bucket, of_pass, in_update)
    else:
        arriving = weight * min(parameters, zero.prefetch_bucket_size)
        weights, buckets = whole + weight * part, bucket + arriving
        # No weights are gathered then.
        in_update += own_gradients + bucket - weight * part - whole
        memory = RankMemory(weights, OPTIMIZER_BYTES * part, own_gradients, buckets, passes.activations, in_update)
    return _with_offload(memory, zero, part, weight)


def _with_offload(memory: RankMemory, zero: ZeroSettings, part: int, weight: int) -> RankMemory:
    """Move what is offloaded to the host; `memory.update` is made the total there."""
    optimizer, gradients, weights, host, update = memory.optimizer, memory.gradients, memory.weights, 0, memory.update
    if zero.offloads_optimizer:
        # DeepSpeed keeps there, beside the state, its gradients in fp32 and what the new weights are copied from.
        host += optimizer + (4 + weight) * part
        optimizer, gradients, update = 0, 0, 0
    if zero.offloads_weights:
        host, weights = host + weight * part, weights - weight * part
    return replace(
        memory,
        optimizer=optimizer,
        gradients=gradients,
        weights=weights,
        host=host,
        update=weights + optimizer + update,
    )
