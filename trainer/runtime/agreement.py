"""What the ranks of a run agree on before each step, by one small reduction."""

from __future__ import annotations

from dataclasses import dataclass, fields

from trainer.runtime import distributed
from trainer.runtime.distributed import World


@dataclass(frozen=True)
class Agreement:
    """What ranks tell each other before each step, and its sums over all of them.

    Attributes:
        stop: how many were asked to stop.
        clock_says_save: how many say that it is time to save.
        failed: how many could not read their part of the batch.
        loss: of the step before, where it is to be judged: each rank's share.
        written: how many have written their files of a save in the background.
        counts: of the labels of each term.
    """

    stop: float
    clock_says_save: float
    failed: float
    loss: float
    written: float
    counts: list[float]

    def over(self, world: World) -> Agreement:
        """Sum each over the ranks, in one reduction; every rank calls it."""
        *single, _ = values = [getattr(self, each.name) for each in fields(self)]
        totals = distributed.all_reduce_sum(world, [*single, *values[-1]])
        return Agreement(*totals[: len(single)], counts=totals[len(single) :])
