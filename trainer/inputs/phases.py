"""The phases of a run with all that they change, of which theta is the model's to know."""

from __future__ import annotations

from trainer.config import Config
from trainer.data.tokenizer import Vocabulary
from trainer.model.trained import find_theta
from trainer.objectives.registry import family_of
from trainer.schedule.phases import Phases, lay_out, with_micro_size, with_thetas


def lay_out_phases(config: Config, vocabulary: Vocabulary, micro_size: int | None = None) -> Phases:
    """Lay out the phases that a config asks for, as `lay_out`.

    Args:
        micro_size: what `batch.micro_size: auto` stands for; None where it is not known.

    Raises:
        UserError: for a model whose theta phases cannot change.
    """
    phases = lay_out(config.data, with_micro_size(config.batch, micro_size))
    own = find_theta(config, vocabulary, family_of(config))
    return phases if own is None else with_thetas(phases, config.data, own)
