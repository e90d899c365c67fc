"""What DeepSpeed 0.19.8 sends in a step at each ZeRO stage: arithmetic.

tests/distributed/test_plan_wire.py counts the collectives of real ranks and finds the same. A collective over n
elements counts as a ring moves it: an all-reduce 2n, a reduce-scatter or an all-gather n; each rank sends (w − 1) / w
of that. With N parameters and g micro-batches a step:

| stage | gradients | weights | in all |
|---|---|---|---|
| 0 | all-reduced once: 2N | – | 2N |
| 1 | all-reduced once: 2N | gathered once: N | 3N |
| 2 | all-reduced in every micro-batch: 2gN | N | (2g + 1)N |
| 3 | reduce-scattered in every micro-batch: gN | gathered in every micro-batch: gN, up to 2gN | 2gN to 3gN |

Muon's matrices travel besides (`matrix_traffic`); StableAdamW's sums, a number a parameter, are not counted.

Stages 1 and 2 all-reduce whole buckets, although each rank keeps a part only (`use_multi_rank_bucket_allreduce`).
Stage 3 gathers weights for the forward pass and keeps them for the backward pass where that comes within
`max_reuse_distance` elements, which for models up to half of it (500 M parameters) is always; beyond that the figure is
about right, not exact. Small weights (`param_persistence_threshold`) stay gathered, and are sent once a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.engine.matrix_exchange import sent_elements
from trainer.engine.state_layout import planned
from trainer.engine.state_size import WEIGHT_BYTES
from trainer.sizing.zero_memory import ZeroSettings


@dataclass(frozen=True)
class Wire:
    """Elements that a step moves, as a ring counts them, and their bytes; `matrices` are those of Muon's exchange."""

    gradients: int
    weights: int
    bytes_per_element: int
    is_exact: bool = True
    matrices: float = 0.0

    @property
    def elements(self) -> float:
        return self.gradients + self.weights + self.matrices

    def sent_bytes(self, world_size: int) -> float:
        """Compute the bytes that each rank sends in a step, and receives."""
        return self.elements * self.bytes_per_element * (world_size - 1) / world_size


def plan_traffic(
    zero: ZeroSettings,
    parameter_sizes: Sequence[int],
    accumulation: int,
    precision: str,
    frozen_sizes: Sequence[int] = (),
    matrices: float = 0.0,
) -> Wire:
    """Compute the traffic of a step in training's steady state.

    Args:
        parameter_sizes: elements of each trained parameter.
        frozen_sizes: of each other one, which stage 3 gathers as well.
        matrices: what `matrix_traffic` counts.
    """
    total, every = sum(parameter_sizes), sum(parameter_sizes) + sum(frozen_sizes)
    if zero.stage == 3:
        sizes = (*parameter_sizes, *frozen_sizes)
        small = sum(size for size in sizes if size <= zero.param_persistence_threshold)
        large = every - small
        again = min(large, max(0, every - zero.max_reuse_distance // 2))
        gradients, weights = accumulation * total, accumulation * (large + again) + small
    else:
        gradients = 2 * total * (accumulation if zero.stage == 2 else 1)
        weights = total if zero.stage else 0
    is_exact = zero.stage < 3 or every <= zero.max_reuse_distance // 2
    return Wire(gradients, weights, WEIGHT_BYTES[precision], is_exact, matrices)


def matrix_traffic(
    shapes: Sequence[tuple[int, ...]], stage: int, world_size: int, precision: str, on_cpu: bool
) -> float:
    """Count what Muon's matrices and results add to a step, in the place of elements of the training precision.

    A rank's pieces of matrices that others compute go there and come back, in fp32 on the CPU and in bf16 on GPUs; at
    stage 0 results alone travel. `trainer.engine.matrix_exchange` says who computes what, and says so here as well.

    Args:
        shapes: of all matrices.
    """
    if not shapes or world_size == 1:
        return 0.0
    sent = sent_elements(planned(shapes, stage, world_size), world_size)
    travelling = WEIGHT_BYTES["fp32" if on_cpu else "bf16"] / WEIGHT_BYTES[precision]
    return sent * travelling * world_size / (world_size - 1)
