"""What StableAdamW and Muon take beside weights, state and gradients while they update: arithmetic on sizes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.engine.state_size import ELEMENTS_AT_ONCE


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
    """Count the bytes of a rank's matrices or their results, and of an iteration on some of them or what travels.

    Args:
        shapes: of all matrices.
    """
    own, iterating, total = 0, 0, sum(map(math.prod, shapes))
    for (n, m), count in Counter((min(shape), max(shape)) for shape in shapes).items():
        here = -(-count // world_size)
        stacked = min(here, max(1, ELEMENTS_AT_ONCE // (n * m)))
        own += here * n * m
        # What goes in, what comes out, and two Gram matrices of each; the stack itself is among the rank's own.
        iterating = max(iterating, stacked * 2 * (n * m + n * n))
    if stage in (0, 3):  # sent and received: all results, or a rank's share
        travels = 2 * (total if stage == 0 else own) * (world_size - 1) // world_size
    else:  # what the ends of its part cut through
        travels = 4 * max(map(math.prod, shapes)) if world_size > 1 else 0
    turned = own // 2  # of matrices that are taller than wide, whose results lie in another order
    return (4 if on_cpu else 2) * (own + max(iterating, turned + travels))
