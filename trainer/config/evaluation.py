"""The section `eval`: when and over what a run is evaluated."""

from __future__ import annotations

from trainer.config.base import PositiveInt, Section


class EvalConfig(Section):
    every_steps: PositiveInt | None = 500
    """Evaluate every so many steps and at the end; null never evaluates."""
    samples: PositiveInt = 1024
    """Blocks of validation data an evaluation; always the same ones, with the same masks."""
