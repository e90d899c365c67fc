"""What StableAdamW and Muon take beside weights, state and gradients while they update: arithmetic on sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.engine.state_size import ELEMENTS_AT_ONCE

_STACKS = 5  # of an iteration: what goes in, its norm taken out, two results, and two Gram matrices of half a stack


@dataclass(frozen=True)
class OptimizerSizes:
    """What of an optimizer's memory is not AdamW's.

    Attributes:
        one_moment: elements that have one moment, not two.
        workspace: bytes of a rank in an update.
    """

    one_moment: int = 0
    workspace: int = 0


ADAMW = OptimizerSizes()


def stable_adamw_workspace(sizes: Sequence[int], world_size: int) -> int:
    """Count the bytes of the ratios of gradients and moments, in fp32, of the parameters that are computed together.

    Args:
        sizes: elements of each parameter.
    """
    share = -(-sum(sizes) // world_size)
    return 4 * min(share, max(ELEMENTS_AT_ONCE, *sizes))


def muon_workspace(shapes: Sequence[tuple[int, ...]], stage: int, world_size: int, on_cpu: bool) -> int:
    """Count the bytes of a rank's matrices, of an iteration on some of them, and of what travels.

    Args:
        shapes: of all matrices.
    """
    sizes = [math.prod(shape) for shape in shapes]
    total, largest = sum(sizes), max(sizes)
    own = max(largest, -(-total // world_size))
    stack = min(own, max(ELEMENTS_AT_ONCE, largest))
    # Sent and received: at stage 0 all results, at stage 3 a rank's share, else what the ends of its part cut through.
    travels = 2 * (total if stage == 0 else own if stage == 3 else 2 * largest) if world_size > 1 else 0
    return (4 if on_cpu else 2) * (own + max(_STACKS * stack, travels))
