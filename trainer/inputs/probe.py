"""A run's labelled texts: checked, and said in a line, before a run begins."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np

from trainer.config import Config
from trainer.data.labels import LabelledTexts, read_labelled, tokenize
from trainer.data.tokenizer import Vocabulary
from trainer.errors import UserError
from trainer.model.classes import MAIN
from trainer.model.rehearsal import rehearse_states
from trainer.model.trained import model_configs
from trainer.objectives.registry import family_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_KEY = "eval.probe.path"


def read_probe(config: Config) -> LabelledTexts | None:
    """Read the labelled texts of a run; None for a run that has none, or never evaluates.

    Raises:
        UserError: as `read_labelled`, where nothing evaluates, and where scikit-learn is not installed.
    """
    probe = config.eval.probe
    if probe is None or config.eval.every_steps is None:
        return None
    if config.data.validation is None:
        raise UserError(
            "The probe is a part of an evaluation, and without validation data there is none.",
            where=f"{_KEY}={probe.path}, data.validation=null",
            remedy="Set data.validation to held-out data, or eval.probe=null.",
        )
    need_scikit_learn(f"{_KEY}={probe.path}")
    return read_labelled(probe.path, probe.text, probe.label, probe.folds, probe.samples, _KEY)


def need_scikit_learn(where: str) -> None:
    """Refuse to go on without the package that fits a probe.

    Raises:
        UserError: when it is not installed.
    """
    if find_spec("sklearn") is None:
        raise UserError(
            "A probe needs the package scikit-learn, which is not installed.",
            where=where,
            remedy="Install it with `pip install scikit-learn` (in a clone of maskwright: pip install -e '.[probe]').",
        )


def open_probe(config: Config, tokenizer: PreTrainedTokenizerFast) -> tuple[LabelledTexts, list[np.ndarray]] | None:
    """Read the labelled texts of a run, and their tokens, at most data.seq_len; None as `read_probe`.

    Raises:
        UserError: as `read_probe` and `tokenize`.
    """
    labelled = read_probe(config)
    return None if labelled is None else (labelled, tokenize(labelled, tokenizer, config.data.seq_len))


def describe_probe(config: Config, vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Check a run's labelled texts, and that its model can be probed; nothing for a run without them.

    Raises:
        UserError: as `open_probe` and `rehearse_states`.
    """
    opened = open_probe(config, tokenizer)
    if opened is None:
        return []
    rehearse_states(model_configs(config, vocabulary, family_of(config))[MAIN])
    labelled, tokens = opened
    full = sum(len(each) == config.data.seq_len for each in tokens)
    cut = f"; {full:,} fill, or are cut to, {config.data.seq_len:,} tokens" if full else ""
    return [f"{labelled.describe()}{cut}"]
