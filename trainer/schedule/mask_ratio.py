"""The share of tokens that is predicted, which may change in the course of a run.

Masking more at first and less later learns faster (Ankner et al., arXiv:2305.15096; mmBERT, arXiv:2509.06888, takes
0.30, 0.15 and 0.05). A stage begins with a sample, so the share of a sample is a function of its number alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from trainer.config import Config, DataConfig, ObjectiveConfig
from trainer.errors import UserError
from trainer.schedule.phases import Phases, changes, lay_out, sample_at, tokens_before

Stages = tuple[tuple[int, float], ...]
"""(first sample, share of the content tokens that is predicted), the first from sample 0 on."""


def mask_ratios(settings: ObjectiveConfig, data: DataConfig, phases: Phases) -> list[tuple[int, float]]:
    """List the shares over a run as (from_tokens, share): the stages of `mask_ratio`, or what phases say.

    Args:
        phases: of `data`.
    """
    if all(phase.mask_ratio is None for phase in data.phases):
        return settings.mask_ratios
    ((_, last),) = settings.mask_ratios
    ratios = [*(last if phase.mask_ratio is None else phase.mask_ratio for phase in data.phases), last]
    # Of two that begin with the same sample the first has none.
    stages = {phases.tokens(phase.first_sample): ratio for phase, ratio in zip(phases, ratios, strict=True)}
    return changes(list(stages.items()))


def evaluated_ratio(config: Config) -> float:
    """Find the share that evaluations predict, whatever the run has come to: their own, or the one it begins with."""
    if config.eval.mask_ratio is not None:
        return config.eval.mask_ratio
    (_, first), *_ = mask_ratios(config.objective, config.data, lay_out(config.data, config.batch))
    return first


def recorded_ratio(settings: ObjectiveConfig, data: DataConfig, phases: Phases) -> Any:
    """Write the shares of a run as `objective.mask_ratio` would, in JSON: what a checkpoint says of them."""
    if all(phase.mask_ratio is None for phase in data.phases):
        return settings.model_dump(mode="json")["mask_ratio"]
    return [{"from_tokens": token, "ratio": ratio} for token, ratio in mask_ratios(settings, data, phases)]


def ratio_stages(settings: ObjectiveConfig, data: DataConfig, phases: Phases) -> Stages:
    """Lay the shares of a run out over its samples.

    Args:
        phases: of `data`.

    Raises:
        UserError: when two stages of `mask_ratio` begin with the same sample.
    """
    ratios = mask_ratios(settings, data, phases)
    stages = tuple((phases.sample_at(token), ratio) for token, ratio in ratios)
    for number, (before, after) in enumerate(itertools.pairwise(stages)):
        if before[0] == after[0]:
            first, second = (ratios[place][0] for place in (number, number + 1))
            raise UserError(
                f"The mask ratios from token {first:,} and from token {second:,} would begin with the same block.",
                where=f"objective.mask_ratio[{number + 1}].from_tokens={second}",
                remedy="Let them begin a block (data.seq_len tokens) apart at least, or leave one of them out.",
            )
    return stages


def stages_within(stages: Stages, phases: Phases, number: int) -> Stages:
    """Keep those of `stages` that some sample of a phase lies in, by their first samples in the run; one at least."""
    phase = phases[number]
    begun = max(place for place, (start, _) in enumerate(stages) if start <= phase.first_sample)
    later = [stage for stage in stages[begun + 1 :] if phase.end_sample is None or stage[0] < phase.end_sample]
    return (stages[begun], *later)


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
        f"token {earliest:,} at the earliest (objective.mask_ratio, data.phases)"
    ]


def describe_ratio(stages: Sequence[tuple[int, float]], unit: str) -> str:
    """Say which share is predicted from where on, such as "0.3, from token 9,000 on 0.15"; stages as (start, ratio)."""
    return ", ".join(f"from {unit} {start:,} on {ratio}" if start else f"{ratio}" for start, ratio in stages)


def _begun(recorded: Any, phases: Sequence[tuple[int, int]], samples: int) -> str:
    """Describe the stages that the first `samples` samples lie in."""
    stages = ObjectiveConfig(mask_ratio=recorded).mask_ratios
    begun = [(sample_at(phases, token), ratio) for token, ratio in stages]
    return describe_ratio([stage for stage in changes(begun) if stage[0] < max(1, samples)], "sample")
