"""What a resume needs beside weights and optimizer: where the run stands."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pydantic import ConfigDict

from trainer.runtime.typed_json import Count, Number


@dataclass
class TrainState:
    """Counters of a run.

    Attributes:
        step: optimizer steps done, skipped ones included.
        samples: blocks consumed, those passed over by a rollback included: the t of the next one, and the only state
            of the data order.
        tokens: positions consumed (samples × seq_len at the time).
        skipped_steps: steps whose update was skipped because a gradient was not finite, or its norm above the bound.
        skipped_in_a_row: the same, since the last good step.
        begun_at: the t with which the last step began or, when it was skipped, the first of those skipped in a row.
        rollbacks: each return to a checkpoint after training had diverged: `step` gone back to, `from_step`,
            `first_sample` and `end_sample` (exclusive) of the data passed over, `reason`.
        recent_losses: of the last applied steps, while `resilience.max_loss_ratio` is set.
        recent_grad_norms: the same for `resilience.max_grad_norm_ratio`.
        evaluated_step: of the last evaluation; null before the first.
        evaluated_on: the validation blocks that it was over: with others evaluations are judged anew.
        best_step: of the evaluation with the lowest `eval/loss`; null before one was finite.
        best_loss: what it found, nats.
        evaluations_since_best: those after it, in a row: none of them was better.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    step: Count = 0
    samples: Count = 0
    tokens: Count = 0
    skipped_steps: Count = 0
    skipped_in_a_row: Count = 0
    begun_at: Count = 0
    rollbacks: list[dict[str, Any]] = field(default_factory=list)
    recent_losses: list[float] = field(default_factory=list)
    recent_grad_norms: list[float] = field(default_factory=list)
    evaluated_step: Count | None = None
    evaluated_on: str = ""
    best_step: Count | None = None
    best_loss: Number | None = None
    evaluations_since_best: Count = 0

    def advance(self, samples: int, seq_len: int, applied: bool) -> None:
        """Count one optimizer step over `samples` blocks."""
        if applied or self.skipped_in_a_row == 0:
            self.begun_at = self.samples
        self.step += 1
        self.samples += samples
        self.tokens += samples * seq_len
        self.skipped_steps += not applied
        self.skipped_in_a_row = 0 if applied else self.skipped_in_a_row + 1

    def judge(self, loss: float, blocks: str) -> bool:
        """Compare the evaluation of the present step with those before; returns whether it is better than all of them.

        An evaluation that was judged before, and is only done again, changes nothing.

        Args:
            loss: `eval/loss`; one that is not finite is better than none.
            blocks: what it is over, as `evaluated_on`.
        """
        if blocks != self.evaluated_on:  # losses over other blocks say nothing of these
            self.forget_evaluations()
        elif self.evaluated_step == self.step:
            return False
        self.evaluated_step, self.evaluated_on = self.step, blocks
        if not math.isfinite(loss) or (self.best_loss is not None and loss >= self.best_loss):
            self.evaluations_since_best += 1
            return False
        self.best_step, self.best_loss, self.evaluations_since_best = self.step, loss, 0
        return True

    def forget_evaluations(self) -> None:
        """Judge from here on as if there had been none."""
        self.evaluated_step = self.best_step = self.best_loss = None
        self.evaluated_on, self.evaluations_since_best = "", 0

    def early_end(self, total_steps: int, patience: int | None) -> str:
        """Say why training ends before its last step, by `eval.patience`; empty when it does not."""
        if patience is None or self.evaluations_since_best < patience or self.step >= total_steps:
            return ""
        found = "had a finite loss"
        if self.best_step is not None:
            found = f"was better than the best, that of step {self.best_step:,}, loss {self.best_loss:.4f}"
        return (
            f"stopped early at step {self.step:,}: of the last {self.evaluations_since_best} evaluations none {found}"
        )

    def rolled_back_to(self, saved: TrainState, reason: str) -> TrainState:
        """Make the state to go on with from a checkpoint's weights, behind the data consumed since it was saved.

        Args:
            saved: the checkpoint's.
        """
        record = {
            "step": saved.step,
            "from_step": self.step,
            "first_sample": saved.samples,
            "end_sample": self.samples,
            "reason": reason,
        }
        return replace(saved, samples=self.samples, tokens=self.tokens, rollbacks=[*self.rollbacks, record])

    @property
    def skipped_ranges(self) -> list[tuple[int, int]]:
        """The samples passed over by rollbacks, as [first, end); none twice, whatever later rollbacks passed over."""
        ranges: list[tuple[int, int]] = []
        reached = 0
        for first, end in sorted((record["first_sample"], record["end_sample"]) for record in self.rollbacks):
            if end > max(first, reached):
                ranges.append((max(first, reached), end))
                reached = end
        return ranges

    @property
    def skipped_samples(self) -> int:
        """Blocks passed over by rollbacks."""
        return sum(end - first for first, end in self.skipped_ranges)

    def skipped_tokens(self, tokens: Callable[[int], int]) -> int:
        """Count the positions passed over by rollbacks.

        Args:
            tokens: samples → positions of the first so many samples of the run.
        """
        return sum(tokens(end) - tokens(first) for first, end in self.skipped_ranges)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
