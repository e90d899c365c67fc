"""Which evaluation is the best, and when a run is out of patience, one evaluation after another."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.state import TrainState

BLOCKS = "32 blocks of a"


def judged(losses: list[float]) -> TrainState:
    state = TrainState()
    for loss in losses:
        state.judge(loss, BLOCKS)
        state.step += 10
    return state


@given(st.lists(st.sampled_from([1.0, 2.0, 3.0, 4.0, math.nan, math.inf]), max_size=12))
def test_the_best_is_the_first_of_the_lowest_and_those_after_it_are_counted(losses: list[float]) -> None:
    state, finite = judged(losses), [loss for loss in losses if math.isfinite(loss)]
    if not finite:
        assert (state.best_step, state.best_loss, state.evaluations_since_best) == (None, None, len(losses))
        return
    place = losses.index(min(finite))
    assert (state.best_step, state.best_loss) == (10 * place, min(finite))
    assert state.evaluations_since_best == len(losses) - place - 1


def test_the_same_evaluation_done_again_counts_once() -> None:
    state = TrainState(step=10)
    assert state.judge(3.0, BLOCKS)
    assert not state.judge(3.0, BLOCKS)
    state.step = 20
    assert not state.judge(3.0, BLOCKS) and not state.judge(3.0, BLOCKS)
    assert (state.best_step, state.evaluations_since_best) == (10, 1)


def test_other_blocks_are_judged_anew() -> None:
    state = replace(judged([3.0, 1.0, 2.0]), step=30)
    assert state.judge(5.0, "16 blocks of a")
    assert (state.best_step, state.best_loss, state.evaluations_since_best) == (30, 5.0, 0)


@pytest.mark.parametrize(
    ("losses", "patience", "words"),
    [
        ([3.0, 2.0, 2.0, 4.0], 2, "evaluations none was better than the best, that of step 10, loss 2.0000"),
        ([math.nan] * 3, 3, "of the last 3 evaluations none had a finite loss"),
        ([3.0, 2.0, 2.0, 4.0], 3, ""),
        ([3.0, 2.0, 2.0, 4.0], None, ""),
    ],
)
def test_a_run_ends_early_with_the_evaluation_that_patience_does_not_reach(
    losses: list[float], patience: int | None, words: str
) -> None:
    state = judged(losses)
    said = state.early_end(1000, patience)
    assert words in said and bool(said) == bool(words)
    assert state.early_end(state.step, patience) == "", "the last step ends it"


def test_a_rollback_takes_back_what_was_judged_since() -> None:
    saved = judged([3.0, 2.0])
    state = replace(saved)
    state.judge(1.0, BLOCKS)
    assert state.best_loss == 1.0
    back = state.rolled_back_to(saved, "a test")
    assert (back.best_loss, back.best_step, back.evaluated_step) == (2.0, 10, 10)
