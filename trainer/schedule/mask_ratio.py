"""The share of tokens that is predicted, which may change in the course of a run.

Masking more at first and less later learns faster (Ankner et al., arXiv:2305.15096; mmBERT, arXiv:2509.06888, takes
0.30, 0.15 and 0.05). A stage begins with a sample, so the share of a sample is a function of its number alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from trainer.config import ObjectiveConfig
from trainer.errors import UserError
from trainer.schedule.phases import sample_at, tokens_before

Stages = tuple[tuple[int, float], ...]
"""(first sample, share of the content tokens that is predicted), the first from sample 0 on."""


def ratio_stages(settings: ObjectiveConfig, phases: Sequence[tuple[int, int]]) -> Stages:
    """Lay the stages of `mask_ratio` out over the samples of a run.

    Args:
        phases: of the run, as (first sample, seq_len).

    Raises:
        UserError: when two of them begin with the same sample.
    """
    stages = tuple((sample_at(phases, token), ratio) for token, ratio in settings.mask_ratios)
    for number, (before, after) in enumerate(itertools.pairwise(stages)):
        if before[0] == after[0]:
            first, second = (settings.mask_ratios[place][0] for place in (number, number + 1))
            raise UserError(
                f"The mask ratios from token {first:,} and from token {second:,} would begin with the same block.",
                where=f"objective.mask_ratio[{number + 1}].from_tokens={second}",
                remedy="Let them begin a block (data.seq_len tokens) apart at least, or leave one of them out.",
            )
    return stages


def ratio_differences(saved: Any, current: Any, phases: Sequence[tuple[int, int]], samples: int) -> list[str]:
    """Say in a line what about the mask ratio of the first `samples` samples has changed; none when nothing has.

    Args:
        saved, current: `mask_ratio` as the config has it, in JSON.
        phases: that the samples lie in, as (first sample, seq_len).
    """
    before, now = (_begun(value, phases, samples) for value in (saved, current))
    if before == now:
        return []
    earliest = tokens_before(phases, samples)
    return [
        f"the mask ratio of the {samples:,} samples seen so far was {before}, now {now}: another one can begin at "
        f"token {earliest:,} at the earliest (objective.mask_ratio)"
    ]


def describe_ratio(stages: Sequence[tuple[int, float]], unit: str) -> str:
    """Say which share is predicted from where on, such as "0.3, from token 9,000 on 0.15"; stages as (start, ratio)."""
    return ", ".join(f"from {unit} {start:,} on {ratio}" if start else f"{ratio}" for start, ratio in stages)


def _begun(recorded: Any, phases: Sequence[tuple[int, int]], samples: int) -> str:
    """Describe the stages that the first `samples` samples lie in."""
    stages = ObjectiveConfig(mask_ratio=recorded).mask_ratios
    begun = [(sample_at(phases, token), ratio) for token, ratio in stages]
    # A stage that changes nothing is none.
    kept = [stage for number, stage in enumerate(begun) if not number or stage[1] != begun[number - 1][1]]
    return describe_ratio([stage for stage in kept if stage[0] < max(1, samples)], "sample")
