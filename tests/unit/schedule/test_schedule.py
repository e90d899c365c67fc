"""Learning rates by formula, and what holds for every schedule."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import ScheduleConfig
from trainer.schedule.learning_rate import learning_rate

PEAK, WARMUP, TOTAL = 2.0, 10, 110
NAMES = ("linear", "cosine", "wsd", "constant")


def rate(step: int, name: str, total: int = TOTAL, warmup: int = WARMUP, **settings: Any) -> float:
    return learning_rate(step, PEAK, total, ScheduleConfig(name=name, warmup_steps=warmup, **settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_warm_up_is_linear_from_zero(name: str):
    assert rate(0, name) == 0.0
    assert rate(1, name) == pytest.approx(PEAK / WARMUP)
    assert rate(5, name) == pytest.approx(PEAK / 2)
    assert rate(WARMUP, name) == pytest.approx(PEAK)


@pytest.mark.parametrize(
    ("name", "settings", "values"),
    [
        ("linear", {}, {11: 1.98, 60: 1.0, 109: 0.02, 110: 0.0}),
        ("linear", {"min_ratio": 0.1}, {60: 1.1, 110: 0.2}),
        ("cosine", {}, {35: 1 + math.sqrt(0.5), 60: 1.0, 85: 1 - math.sqrt(0.5), 110: 0.0}),
        ("cosine", {"min_ratio": 0.1}, {60: 1.1, 110: 0.2}),
        ("wsd", {}, {60: 2.0, 99: 2.0, 104: 2 * 6 / 11, 110: 0.0}),  # 11 steps of decay: a tenth of all
        ("wsd", {"decay_fraction": 0.5, "min_ratio": 0.5}, {55: 2.0, 66: 1.8, 110: 1.0}),
        ("wsd", {"decay_steps": 50, "min_ratio": 0.5}, {60: 2.0, 85: 1.5, 110: 1.0}),
        ("wsd", {"decay_steps": 100, "decay": "cosine"}, {10: 2.0, 35: 1 + math.sqrt(0.5), 60: 1.0, 110: 0.0}),
        ("wsd", {"decay_steps": 100, "decay": "1-sqrt"}, {10: 2.0, 11: 1.8, 35: 1.0, 91: 0.2, 110: 0.0}),
        ("wsd", {"decay_steps": 100, "decay": "1-sqrt", "min_ratio": 0.5}, {11: 1.9, 35: 1.5, 110: 1.0}),
        ("constant", {}, {11: 2.0, 60: 2.0, 110: 2.0}),
    ],
)
def test_values_by_formula(name: str, settings: dict[str, Any], values: dict[int, float]):
    assert {step: rate(step, name, **settings) for step in values} == pytest.approx(values, abs=1e-12)


def test_the_factor_of_a_phase_multiplies_whatever_the_rate_is():
    schedule = ScheduleConfig(name="wsd", warmup_steps=10)
    steps = (1, 5, 60, 104)
    halved = [learning_rate(step, PEAK, TOTAL, schedule, 0.5) for step in steps]
    assert halved == [rate(step, "wsd") / 2 for step in steps]
    assert [learning_rate(step, PEAK, TOTAL, schedule, 1.0) for step in steps] == [rate(step, "wsd") for step in steps]


@pytest.mark.parametrize("name", NAMES)
def test_without_warm_up_the_first_step_is_near_the_peak(name: str):
    assert rate(0, name, warmup=0) == pytest.approx(PEAK)
    assert rate(1, name, warmup=0) == pytest.approx(PEAK, rel=0.02)


@given(
    name=st.sampled_from(NAMES),
    total=st.integers(1, 2000),
    warmup=st.integers(0, 500),
    min_ratio=st.floats(0, 1),
    decay_fraction=st.floats(0.01, 1),
    data=st.data(),
)
def test_bounds_and_no_jumps(
    name: str, total: int, warmup: int, min_ratio: float, decay_fraction: float, data: st.DataObject
):
    settings = {"min_ratio": min_ratio, "decay_fraction": decay_fraction}
    step = data.draw(st.integers(0, total - 1))
    now, then = (rate(at, name, total, warmup, **settings) for at in (step, step + 1))
    assert 0.0 <= now <= PEAK * (1 + 1e-12)
    if step >= warmup:
        assert now >= min_ratio * PEAK * (1 - 1e-12)
        assert then <= now * (1 + 1e-12), "the rate never rises after the warm-up"
    # The steepest slopes: warm-up; linear and wsd over their stretch; cosine's, π/2 times linear's.
    decay_steps = max(1, round(decay_fraction * total)) if name == "wsd" else max(1, total - warmup)
    steepest = max(
        1 / max(1, warmup), math.pi / 2 / decay_steps
    )  # no jump, where a warm-up reaches into a decay either
    assert abs(then - now) <= PEAK * steepest * (1 + 1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_a_warm_up_as_long_as_the_run_ends_at_the_peak_or_in_the_decay(name: str):
    assert rate(50, name, total=100, warmup=100) == pytest.approx(PEAK / 2)
    decayed = 0.1 if name == "wsd" else 1.0  # wsd is 9 steps into the 10 of its decay
    assert rate(99, name, total=100, warmup=100) == pytest.approx(PEAK * 0.99 * decayed)
