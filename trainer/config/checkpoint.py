"""The section `checkpoint`: when a run is saved, and what is kept of it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from trainer.config.base import Minutes, PositiveInt, Section, StepsOrAuto


class CheckpointConfig(Section):
    every_steps: StepsOrAuto | None = 500
    """Save every so many steps; null saves only at the end and when stopped. auto: a tenth of the run's steps, at least
    1 and at most 500."""
    every_minutes: Minutes | None = None
    """Also save when so many minutes have passed since the last save."""
    keep_last: PositiveInt = 2
    """How many of the newest whole checkpoints to keep; two at least, whatever is given, as one may be damaged. The
    one that this start was resumed from is kept as well."""
    in_background: Annotated[bool, Field(alias="async")] = False
    """Copy the state to the host's memory, go on training, and write the files in a thread meanwhile, one save at once.
    Each rank needs free memory as large as its files."""
    keep_every_steps: PositiveInt | None = None
    """Also keep every checkpoint whose step is a multiple of this."""
    keep_best: bool = False
    """Also keep the checkpoint of the best evaluation so far (the lowest eval/loss). An evaluation that is better than
    all before is saved at once, but for that of step 0. `maskwright convert RUN --best` converts it."""
