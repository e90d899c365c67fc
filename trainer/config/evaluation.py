"""The section `eval`: when and over what a run is evaluated."""

from __future__ import annotations

from trainer.config.base import PositiveInt, Section, StepsOrAuto


class EvalConfig(Section):
    every_steps: StepsOrAuto | None = 500
    """Evaluate every so many steps and at the end; null never evaluates. auto: a tenth of the run's steps, at least 1
    and at most 500."""
    samples: PositiveInt = 1024
    """Blocks of validation data an evaluation; always the same ones, with the same masks."""
    patience: PositiveInt | None = None
    """End the run, saved and with exit code 0, when so many evaluations in a row were no better than the best before
    them. The learning rate follows the whole length all the same. With a larger number, or null, the run goes on."""
