"""Learning-rate schedules: pure functions of the step, so that a resume needs no scheduler state."""

from __future__ import annotations

import math

from trainer.config import ScheduleConfig


def learning_rate(step: int, peak: float, total_steps: int, schedule: ScheduleConfig, factor: float = 1.0) -> float:
    """Compute the rate of optimizer step `step` (1 is the first, `total_steps` the last), of a resolved config.

    factor · peak · min(1, step / warmup_steps) · shape, where with x the share of the steps after the warm-up that is
    done and m = min_ratio the shape is

    - linear: 1 − (1 − m) · x, as in BERT and RoBERTa (arXiv:1907.11692, section 3.1);
    - cosine: m + (1 − m) · (1 + cos πx) / 2 (arXiv:1608.03983);
    - wsd: 1, then m + (1 − m) · f(x) over the last steps (arXiv:2404.06395), x the share of these that is done and f
      by `decay` linear: 1 − x, cosine: (1 + cos πx) / 2, or 1-sqrt: 1 − √x (arXiv:2405.18392);
    - constant: 1.

    Args:
        factor: of the phase that the step is of.
    """
    assert schedule.warmup_steps is not None
    warmed_up = min(1.0, step / schedule.warmup_steps) if schedule.warmup_steps else 1.0
    return peak * warmed_up * _shape(step, total_steps, schedule.warmup_steps, schedule) * factor


def decay_steps(total_steps: int, schedule: ScheduleConfig) -> int:
    """Count the last steps over which the rate of wsd falls, of a resolved config."""
    if schedule.decay_steps is not None:
        return schedule.decay_steps
    assert schedule.decay_fraction is not None
    return max(1, round(schedule.decay_fraction * total_steps))


def _shape(step: int, total_steps: int, warmup_steps: int, schedule: ScheduleConfig) -> float:
    floor = schedule.min_ratio
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    done = min(1.0, max(0.0, done))
    if schedule.name == "linear":
        return 1.0 - (1.0 - floor) * done
    if schedule.name == "cosine":
        return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * done))
    if schedule.name == "wsd":
        left = min(1.0, max(0, total_steps - step) / decay_steps(total_steps, schedule))
        return floor + (1.0 - floor) * _decayed(left, schedule.decay)
    return 1.0


def _decayed(left: float, decay: str) -> float:
    """Compute what is left of the rate where `left` is left of the steps of the decay."""
    if decay == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * (1.0 - left)))
    return 1.0 - math.sqrt(1.0 - left) if decay == "1-sqrt" else left
