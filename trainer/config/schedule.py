"""The section `schedule`: how the learning rate rises, stays and falls."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import model_validator

from trainer.config.base import Fraction, NaturalInt, PositiveFraction, PositiveInt, Section

WARMUPS = ("warmup_steps", "warmup_fraction", "warmup_tokens")
DECAYS = ("decay_fraction", "decay_steps", "decay_tokens")


class ScheduleConfig(Section):
    name: Literal["linear", "cosine", "wsd", "constant"] = "linear"
    """Shape of the learning rate after the warm-up. wsd: it stays (warm-up, stable, decay; arXiv:2404.06395), and falls
    at the end."""
    warmup_steps: NaturalInt | None = None
    """Steps of linear warm-up from 0, at most those of the run. Default: 6 % of the run's steps, at most 1,000."""
    warmup_fraction: Fraction | None = None
    """The same as a share of the run's steps, rounded up; in the place of warmup_steps."""
    warmup_tokens: PositiveInt | None = None
    """The same in tokens, rounded up to whole steps; in the place of warmup_steps."""
    decay: Literal["linear", "cosine", "1-sqrt"] = "linear"
    """wsd only: how the rate falls; 1-sqrt as 1 − √x, x the share of the decay that is done (arXiv:2405.18392)."""
    decay_fraction: PositiveFraction | None = 0.1
    """wsd only: share of all steps, at the end, over which the rate falls to its minimum."""
    decay_steps: PositiveInt | None = None
    """The same in steps; in the place of decay_fraction."""
    decay_tokens: PositiveInt | None = None
    """The same in tokens, rounded up to whole steps; in the place of decay_fraction."""
    min_ratio: Fraction = 0.0
    """Final learning rate over peak (linear, cosine, wsd)."""

    @model_validator(mode="before")
    @classmethod
    def a_given_decay_has_no_default(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and "decay_fraction" not in raw and any(raw.get(name) is not None for name in DECAYS):
            return {**raw, "decay_fraction": None}
        return raw

    @model_validator(mode="after")
    def one_of_each(self) -> Self:
        for names in (WARMUPS, DECAYS):
            given = [name for name in names if getattr(self, name) is not None]
            if len(given) > 1:
                raise ValueError(f"has both {' and '.join(given)}: leave one of them out")
        if self.name == "wsd" and all(getattr(self, name) is None for name in DECAYS):
            raise ValueError(f"with name wsd needs one of {', '.join(DECAYS)}")
        return self

    @model_validator(mode="after")
    def a_decay_is_of_wsd(self) -> Self:
        if self.name == "wsd":
            return self
        for key in ("decay", "decay_steps", "decay_tokens"):
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} does nothing with name {self.name}: leave it out, or set name to wsd")
        return self
