"""From what the section `schedule` says in steps, tokens or shares to steps: how long the rate rises and falls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from trainer.config import ScheduleConfig
from trainer.config.schedule import DECAYS, WARMUPS
from trainer.errors import UserError
from trainer.schedule.batch_plan import BatchPlan
from trainer.schedule.learning_rate import decay_steps


def share_of_steps(fraction: float, steps: int) -> int:
    """Take this fraction of the steps, rounded up; 0.06 is six hundredths, as it was written."""
    return math.ceil(Fraction(str(fraction)) * steps)


def resolve_schedule(schedule: ScheduleConfig, plan: BatchPlan, usual_warmup: int, must_fit: bool) -> ScheduleConfig:
    """Put steps in the place of tokens, of a share of warm-up and of a warm-up that is not given.

    A decay that is given as a share stays one: a run that has begun keeps it as it is written.

    Args:
        usual_warmup: steps of a warm-up that is not given.
        must_fit: whether a warm-up that is longer than the run is refused.

    Raises:
        UserError: when the warm-up or the decay does not fit into the run.
    """
    total, warmup, decay = plan.total_steps, schedule.warmup_steps, schedule.decay_steps
    is_given = warmup is not None or schedule.warmup_tokens is not None
    if schedule.warmup_fraction is not None:
        warmup = share_of_steps(schedule.warmup_fraction, total)
    elif schedule.warmup_tokens is not None:
        warmup = _steps_that_reach(plan, schedule.warmup_tokens)
    elif warmup is None:
        warmup = usual_warmup
    if schedule.decay_tokens is not None:
        before = plan.tokens_ahead(0, total) - schedule.decay_tokens
        decay = total - (_whole_steps(plan, before) if before >= 0 else -1)  # longer than the run: refused below
    if is_given and must_fit and warmup > total:
        raise _longer_than_the_run(schedule, total, warmup, usual_warmup)
    if decay is not None and warmup + decay > total:
        raise _no_room_for_decay(schedule, total, warmup, decay)
    steps = {"warmup_steps": warmup, "decay_steps": decay}
    return schedule.model_copy(update={**steps, "warmup_fraction": None, "warmup_tokens": None, "decay_tokens": None})


def describe_schedule(schedule: ScheduleConfig, peak: float, total_steps: int, factors: Sequence[float] = ()) -> str:
    """Describe a resolved schedule in a line.

    Args:
        factors: by which phases multiply the rate.
    """
    after = f"{schedule.name} to {schedule.min_ratio:g} of it"
    if schedule.name == "wsd":
        share = (
            f"{schedule.decay_fraction:.0%} of the"
            if schedule.decay_fraction is not None
            else f"{schedule.decay_steps:,}"
        )
        shape = "" if schedule.decay == "linear" else f", as {schedule.decay}"
        steps = decay_steps(total_steps, schedule)
        ends = f"over the last {share} step{'s' if schedule.decay_fraction is not None or steps > 1 else ''}"
        after = f"constant, {ends} to {schedule.min_ratio:g} of it{shape}"
    elif schedule.name == "constant":
        after = "constant"
    times = ", times the factor of each phase" if any(factor != 1.0 for factor in factors) else ""
    return f"schedule: {schedule.warmup_steps or 0:,} steps of warm-up to {peak:.3g}, then {after}{times}"


def _longer_than_the_run(schedule: ScheduleConfig, total: int, warmup: int, fitting: int) -> UserError:
    key = next(name for name in WARMUPS if getattr(schedule, name) is not None)
    return UserError(
        f"The run has {total:,} step{'s' if total > 1 else ''} and would end within its warm-up of {warmup:,}, "
        "before the learning rate reaches its peak.",
        where=f"schedule.{key}={getattr(schedule, key)}",
        remedy=f"Set schedule.warmup_steps to {fitting} (6 % of the steps) or leave it out, or train for longer.",
    )


def _no_room_for_decay(schedule: ScheduleConfig, total: int, warmup: int, decay: int) -> UserError:
    key = next(name for name in DECAYS if getattr(schedule, name) is not None)
    given = getattr(schedule, key)
    if decay > total:
        problem = f"would begin within its decay of {given:,} {key.removeprefix('decay_')}"
    else:
        problem = f"would begin its decay of {decay:,} before the end of its warm-up of {warmup:,}"
    room = total - warmup
    fitting = (
        f"Set schedule.decay_steps to {room} or fewer" if room > 0 else "Shorten the warm-up (schedule.warmup_steps)"
    )
    return UserError(
        f"The run has {total:,} step{'s' if total > 1 else ''} and {problem}.",
        where=f"schedule.{key}={given}",
        remedy=f"{fitting}, or train for longer.",
    )


def _whole_steps(plan: BatchPlan, tokens: int) -> int:
    """Count the steps from the first one on that are done within so many positions."""
    steps, left = 0, tokens
    for run in plan.runs(0):
        fitting = left // run.shape.tokens
        if fitting < run.steps:
            return steps + fitting
        steps, left = steps + run.steps, left - run.steps * run.shape.tokens
    raise AssertionError("the last steps go on for ever")


def _steps_that_reach(plan: BatchPlan, tokens: int) -> int:
    """Count the fewest steps from the first one on that come to so many positions."""
    return _whole_steps(plan, tokens - 1) + 1
