"""A run's teacher: checked, and said in a line, before a run begins."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.config import Config
from trainer.data.tokenizer import Vocabulary
from trainer.model.model_code import unused_code
from trainer.model.teacher import check_same_ids, check_teacher
from trainer.objectives.registry import family_of
from trainer.objectives.teacher import described


def describe_teacher(config: Config, vocabulary: Vocabulary, seq_lens: Sequence[int]) -> list[str]:
    """Check the teacher and say who it is; nothing for a run without one.

    Args:
        seq_lens: tokens a block: `data.seq_len`, and those of the phases.

    Raises:
        UserError: when it cannot teach this run.
    """
    teacher = config.objective.teacher
    if teacher is None:
        return []
    note = check_same_ids(config)
    who = check_teacher(config, vocabulary, seq_lens, family_of(config))
    line = f"teacher: {teacher.model}, {who}; the loss is {described(teacher.model_dump())}"
    return [line, *([note] if note else []), *unused_code(teacher.model)]
