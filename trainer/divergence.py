"""When training has diverged: what a good step is, and when there have been too few of them.

Arithmetic on numbers that are the same on all ranks, so that all come to the same verdict without asking each other.
What it remembers is part of the state of the run: a resumed run judges as the uninterrupted one.
"""

from __future__ import annotations

import math
import statistics

from trainer.config import ResilienceConfig
from trainer.errors import DivergedError, DivergenceError
from trainer.state import TrainState


class DivergenceWatch:
    """Judges each step by the settings of `resilience`."""

    def __init__(self, settings: ResilienceConfig) -> None:
        self.settings = settings

    @property
    def needs_loss(self) -> bool:
        """Whether `observe_loss` is to be called for each applied step."""
        return self.settings.max_loss_ratio is not None

    def max_grad_norm(self, state: TrainState) -> float | None:
        """Compute the norm above which the next step is to be skipped; None when norms are not watched."""
        ratio = self.settings.max_grad_norm_ratio
        return None if ratio is None else self._bound(state.recent_grad_norms, ratio)

    def observe_step(self, state: TrainState, grad_norm: float | None) -> None:
        """Judge the last step of `state`.

        Args:
            grad_norm: of the step, before clipping; needed when norms are watched and the step was applied.

        Raises:
            DivergenceError: when too many steps in a row were skipped.
        """
        limit = self.settings.max_skipped_steps
        if state.skipped_in_a_row >= limit:
            raise DivergenceError(
                f"{limit} steps in a row were skipped, up to step {state.step}: gradients were not finite or too large",
                onset=state.step - state.skipped_in_a_row + 1,
                where=f"resilience.max_skipped_steps={limit}",
            )
        if self.settings.max_grad_norm_ratio is not None and state.skipped_in_a_row == 0:
            assert grad_norm is not None
            self._remember(state.recent_grad_norms, grad_norm)

    def observe_loss(self, state: TrainState, loss: float) -> None:
        """Judge the loss of the last step of `state`, which was applied: the mean over its global batch.

        Raises:
            DivergenceError: when it is above the bound.
        """
        ratio = self.settings.max_loss_ratio
        assert ratio is not None
        bound = self._bound(state.recent_losses, ratio)
        if not (math.isfinite(loss) and loss <= bound):
            raise DivergenceError(
                f"the loss of step {state.step} is {loss:.4g}, above {bound:.4g}, which is {ratio:g} times the median "
                f"of the {self.settings.window} steps before",
                onset=state.step,
                where=f"resilience.max_loss_ratio={ratio:g}",
            )
        self._remember(state.recent_losses, loss)

    def _bound(self, recent: list[float], ratio: float) -> float:
        return ratio * statistics.median(recent) if len(recent) >= self.settings.window else math.inf

    def _remember(self, recent: list[float], value: float) -> None:
        recent.append(value)
        del recent[: -self.settings.window]


def make_final_error(divergence: DivergenceError, settings: ResilienceConfig, rollbacks: int) -> DivergedError:
    """Make the error that ends a run that is not, or cannot be, rolled back."""
    if settings.on_divergence == "stop":
        also, remedy = "", " Or let the run pass over such data: resilience.on_divergence=rollback."
    elif rollbacks >= settings.max_rollbacks:
        also, remedy = f", after {rollbacks} rollbacks (resilience.max_rollbacks={settings.max_rollbacks})", ""
    else:
        also, remedy = "; there is no good checkpoint from before to go back to", ""
    return DivergedError(
        f"Training diverged{also}: {divergence.reason}.",
        where=divergence.where,
        remedy="Lower optimizer.lr or lengthen schedule.warmup_steps, and resume: what is saved is finite." + remedy,
    )
