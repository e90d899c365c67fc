"""The evaluations of a run that trains: which steps have one, and what cuts one short."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trainer.config import EvalConfig
from trainer.evaluation.evaluated import Evaluated
from trainer.evaluation.evaluator import Evaluator
from trainer.runtime import distributed
from trainer.runtime.distributed import World
from trainer.runtime.signals import StopRequest

LOSS = "eval/loss"
"""What evaluations are judged by: the lowest is the best."""


@dataclass(frozen=True)
class Evaluations:
    """The evaluations of one run.

    Attributes:
        evaluator: None where there is no validation data.
        settings: resolved, so that `every_steps` is no auto.
        total_steps: after the last of which there is one in any case.
    """

    evaluator: Evaluator | None
    settings: EvalConfig
    total_steps: int

    def is_due(self, step: int) -> bool:
        """Tell whether there is one after this step; after step 0 it is of the untrained model."""
        every = self.settings.every_steps
        is_nth = isinstance(every, int) and step % every == 0
        return self.evaluator is not None and (is_nth or step == self.total_steps)

    @property
    def blocks(self) -> str:
        """Name what they are over: losses of others cannot be compared with theirs."""
        assert self.evaluator is not None
        ratio = self.settings.mask_ratio  # one of its own; the run's first share is the same in all of them
        masked = "" if ratio is None else f", {ratio:g} of their tokens predicted"
        return f"{self.evaluator.samples} blocks of {self.evaluator.data.fingerprint}{masked}"

    @property
    def examples(self) -> list[dict[str, Any]]:
        """What the model told of the first samples in the last one: see `Evaluator`."""
        return self.evaluator.examples if self.evaluator is not None else []

    def run(
        self, step: int, engine: Evaluated, world: World, stop: StopRequest, progress: Callable[[], None]
    ) -> dict[str, float] | None:
        """Evaluate after this step; every rank calls it, and is given the same numbers, to the last bit.

        A request to stop cuts it short, to be done after the resume; after the last step there is none.

        Args:
            progress: called before each batch.

        Returns:
            As `Evaluator.run`.
        """
        assert self.evaluator is not None

        def stops() -> bool:
            progress()
            return stop.received and step < self.total_steps

        return distributed.broadcast_from_main(world, self.evaluator.run(engine, world, stops))
