"""What counts as divergence, and the state that a rollback leaves."""

from __future__ import annotations

import math

import pytest

from trainer.config import ResilienceConfig
from trainer.divergence import DivergenceWatch
from trainer.errors import DivergenceError
from trainer.state import TrainState


def after(steps: int, watch: DivergenceWatch, norm: float = 1.0, loss: float = 2.0) -> TrainState:
    """A state after good steps of 8 blocks."""
    state = TrainState()
    for _ in range(steps):
        state.advance(8, 32, True)
        watch.observe_step(state, norm)
        if watch.needs_loss:
            watch.observe_loss(state, loss)
    return state


def test_where_the_last_step_or_the_first_skipped_in_a_row_began() -> None:
    state = TrainState()
    begun = []
    for samples, applied in ((8, True), (8, True), (16, False), (24, False), (24, True), (24, False)):
        state.advance(samples, 32, applied)
        begun.append(state.begun_at)
    assert begun == [0, 8, 16, 16, 56, 80]


def skip(state: TrainState, watch: DivergenceWatch) -> None:
    state.advance(8, 32, False)
    watch.observe_step(state, math.nan)


def test_skipped_steps_in_a_row_are_divergence_from_the_first_of_them_on() -> None:
    watch = DivergenceWatch(ResilienceConfig(max_skipped_steps=3))
    state = after(4, watch)
    for _ in range(2):  # two in a row, one good one, twice: never three in a row
        skip(state, watch)
        skip(state, watch)
        state.advance(8, 32, True)
        watch.observe_step(state, None)
    skip(state, watch)
    skip(state, watch)
    with pytest.raises(DivergenceError, match="3 steps in a row were skipped, up to step 13") as raised:
        skip(state, watch)
    assert raised.value.onset == 11
    assert raised.value.where == "resilience.max_skipped_steps=3"
    assert state.skipped_steps == 7


def test_without_bounds_nothing_is_remembered_and_no_norm_is_asked_for() -> None:
    watch = DivergenceWatch(ResilienceConfig())
    state = after(300, watch)
    assert watch.max_grad_norm(state) is None and not watch.needs_loss
    assert state.recent_losses == state.recent_grad_norms == []


def test_the_norm_is_bounded_by_the_median_of_the_applied_steps_of_the_window() -> None:
    watch = DivergenceWatch(ResilienceConfig(max_grad_norm_ratio=3.0, window=5))
    state = after(4, watch, norm=9.0)
    assert watch.max_grad_norm(state) == math.inf  # not enough steps to tell
    for norm in (1.0, 2.0, 3.0, 100.0):
        state.advance(8, 32, True)
        watch.observe_step(state, norm)
    skip(state, watch)  # what was skipped does not move the median
    assert state.recent_grad_norms == [9.0, 1.0, 2.0, 3.0, 100.0]
    assert watch.max_grad_norm(state) == 9.0


@pytest.mark.parametrize("loss", [4.2, math.inf, math.nan])
def test_a_loss_above_its_bound_is_divergence_at_that_step(loss: float) -> None:
    watch = DivergenceWatch(ResilienceConfig(max_loss_ratio=2.0, window=3))
    state = after(2, watch)
    state.advance(8, 32, True)
    watch.observe_loss(state, 50.0)  # the window is not full
    state.advance(8, 32, True)
    watch.observe_loss(state, 4.0)  # not above 2 × 2
    state.advance(8, 32, True)
    state.recent_losses[:] = [2.0, 2.0, 2.1]
    with pytest.raises(DivergenceError, match=r"the loss of step 5 is .* above 4") as raised:
        watch.observe_loss(state, loss)
    assert raised.value.onset == 5
    assert state.recent_losses == [2.0, 2.0, 2.1]


def test_a_shorter_window_forgets_what_is_older() -> None:
    state = after(50, DivergenceWatch(ResilienceConfig(max_loss_ratio=2.0, window=50)))
    shorter = DivergenceWatch(ResilienceConfig(max_loss_ratio=2.0, window=4))
    state.advance(8, 32, True)
    shorter.observe_loss(state, 3.0)
    assert state.recent_losses == [2.0, 2.0, 2.0, 3.0]


def test_a_rollback_keeps_the_steps_of_the_checkpoint_and_the_place_in_the_data() -> None:
    saved = TrainState(step=8, samples=64, tokens=2048, recent_losses=[2.0])
    now = TrainState(step=11, samples=88, tokens=2816, skipped_steps=3, skipped_in_a_row=3, recent_losses=[2.0, 3.0])
    state = now.rolled_back_to(saved, "why")
    assert (state.step, state.samples, state.tokens) == (8, 88, 2816)
    assert (state.skipped_steps, state.skipped_in_a_row, state.recent_losses) == (0, 0, [2.0])
    record = {"step": 8, "from_step": 11, "first_sample": 64, "end_sample": 88, "reason": "why"}
    assert state.rollbacks == [record]
    assert state.skipped_samples == 24
    assert TrainState(**state.to_dict()) == state


def test_blocks_that_two_rollbacks_passed_over_count_once() -> None:
    first = TrainState(step=12, samples=96).rolled_back_to(TrainState(step=10, samples=80), "a")
    assert (first.samples, first.skipped_samples) == (96, 16)
    later = TrainState(step=13, samples=120, rollbacks=first.rollbacks)  # and now to an older checkpoint
    second = later.rolled_back_to(TrainState(step=5, samples=40), "b")
    assert (second.step, second.samples, second.skipped_samples) == (5, 120, 80)
    assert len(second.rollbacks) == 2
