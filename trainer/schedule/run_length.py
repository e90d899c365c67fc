"""What follows from the length of a run: its warm-up, how often it reports, and whether it is long enough to learn.

How often a run is evaluated and saved, where that is `auto`, follows from it as well.

A default that changes would change runs that have begun. So what a config leaves out is taken from a numbered set of
defaults (`Config.defaults`), each checkpoint records its own, and a set is never edited: a change is a new one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from trainer.config import DEFAULTS, Config
from trainer.schedule.batch_plan import BatchPlan, divisors
from trainer.schedule.warmup_and_decay import describe_schedule, resolve_schedule, share_of_steps

FEW_UPDATES = 100
"""Fewer of them teach a model little: in each, Adam moves a weight by about the learning rate at most."""

MOST_PASSES = 40
"""From so many passes on a repeated text was worth nothing in Muennighoff et al. 2023, arXiv:2305.16264."""


@dataclass(frozen=True)
class Defaults:
    """One set.

    Attributes:
        warmup_steps, log_every_steps: from the steps of the run.
        whole_steps: epochs are rounded up to full steps.
        warmup_must_fit: a warm-up that is longer than the run is refused.
        auto_every_steps: what auto stands for in `eval.every_steps` and `checkpoint.every_steps`, from the same.
    """

    warmup_steps: Callable[[int], int]
    log_every_steps: Callable[[int], int]
    whole_steps: bool
    warmup_must_fit: bool
    auto_every_steps: Callable[[int], int] = lambda steps: min(500, max(1, steps // 10))


_SETS = {
    1: Defaults(lambda _: 1000, lambda _: 10, whole_steps=True, warmup_must_fit=False),
    # 6 % as RoBERTa's fine-tuning (arXiv:1907.11692, table 10); its pre-training has 4.8 %.
    2: Defaults(
        lambda steps: min(1000, share_of_steps(0.06, steps)),
        lambda steps: min(10, max(1, steps // 20)),
        whole_steps=False,
        warmup_must_fit=True,
    ),
}
assert max(_SETS) == DEFAULTS


def find_defaults(config: Config) -> Defaults:
    return _SETS[config.defaults]


def resolve(config: Config, plan: BatchPlan) -> Config:
    """Return the config with numbers in the place of what follows from the length of the run.

    Raises:
        UserError: when the warm-up or the decay does not fit into the run.
    """
    steps, defaults = plan.total_steps, find_defaults(config)
    every = defaults.log_every_steps(steps) if config.logging.every_steps is None else config.logging.every_steps
    auto = {"every_steps": defaults.auto_every_steps(steps)}
    return config.model_copy(
        update={
            "schedule": resolve_schedule(config.schedule, plan, defaults.warmup_steps(steps), defaults.warmup_must_fit),
            "logging": config.logging.model_copy(update={"every_steps": every}),
            "eval": config.eval.model_copy(update=auto if config.eval.every_steps == "auto" else {}),
            "checkpoint": config.checkpoint.model_copy(update=auto if config.checkpoint.every_steps == "auto" else {}),
        }
    )


def describe_length(config: Config, plan: BatchPlan, passes: float | None = None) -> list[str]:
    """Describe the schedule of a resolved config in a line, with one more where the text is too small for the run.

    Args:
        passes: over the training data, over that which is seen most often; None where they are not known.
    """
    warmup = config.schedule.warmup_steps or 0
    factors = [phase.lr_factor for phase in config.data.phases]
    line = describe_schedule(config.schedule, config.optimizer.lr, plan.total_steps, factors)
    if warmup > plan.total_steps:
        line = (
            f"schedule: THE RUN ENDS WITHIN THE WARM-UP of {warmup:,} steps, before the rate reaches its peak; a new "
            f"run takes {_SETS[DEFAULTS].warmup_steps(plan.total_steps)} steps (schedule.warmup_steps)"
        )
    too_small = few_updates(config, plan) or _lengthened(config, plan, passes)
    return [line, too_small] if too_small else [line]


def few_updates(config: Config, plan: BatchPlan) -> str:
    """Warn in a line, with the remedy, where a run of epochs or tokens has only a handful of steps; else return "".

    Who asks for a number of steps gets what he asks for.
    """
    if config.train.steps is not None or plan.total_steps >= FEW_UPDATES:
        return ""
    samples, steps = plan.end_sample, plan.total_steps
    line = (
        f"FEW UPDATES: {steps} step{'s' if steps > 1 else ''} in all, of up to {plan.global_size} sequences, teach a "
        "model little"
    )
    if steps == config.train.min_steps:
        return f"{line}: set train.min_steps to {FEW_UPDATES}, or give more text"
    size, micro_size = _smaller_batch(plan, samples // FEW_UPDATES)
    if not size:
        name = "epochs" if config.train.epochs is not None else "tokens"
        needed = math.ceil(getattr(config.train, name) * FEW_UPDATES * plan.world_size / samples)
        return (
            f"{line}: set train.{name} to {needed:,}, batch.global_size to {plan.world_size} and batch.micro_size to "
            f"1 for {FEW_UPDATES}, or give more text"
        )
    micro = "" if micro_size == plan.micro_size else f" and batch.micro_size to {micro_size}"
    about = "about " if config.batch.warmup is not None else ""  # which has to lead there
    return f"{line}: set batch.global_size to {about}{size}{micro} for {-(-samples // size):,}, or train for longer"


def _lengthened(config: Config, plan: BatchPlan, passes: float | None) -> str:
    """Say that a run is as long as `train.min_steps`, and what to expect where that repeats the text too often."""
    train, steps = config.train, plan.total_steps
    if train.steps is not None or steps != train.min_steps or passes is None:
        return ""
    line = (
        f"LITTLE TEXT: {steps / passes:.3g} steps a pass; train.min_steps makes {steps:,} of them, {passes:.3g} passes "
        "(null: as many as asked for)"
    )
    if passes <= MOST_PASSES:
        return line
    return (
        f"{line}. What is repeated more than some {MOST_PASSES} times teaches a model little more (arXiv:2305.16264); "
        "eval/loss rises when it learns the text by heart. Give more text, or a smaller batch.global_size"
    )


def _smaller_batch(plan: BatchPlan, most: int) -> tuple[int, int]:
    """Find the largest batch of at most `most` sequences that divides over the ranks, and its micro-batch; 0 for none.

    The micro-batch stays what it is where it can.
    """
    whole = most // (plan.micro_size * plan.world_size)
    if whole:
        return whole * plan.micro_size * plan.world_size, plan.micro_size
    a_rank = most // plan.world_size
    fitting = [size for size in divisors(a_rank) if size <= plan.micro_size] if a_rank else [1]
    return a_rank * plan.world_size, fitting[-1]
