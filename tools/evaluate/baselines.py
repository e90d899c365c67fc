"""What gives a loss its meaning: that of guessing, and that of knowing how frequent tokens are."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np

from tools.baselines import token_counts
from tools.evaluate.data import Data
from trainer.data.blocks import IGNORED_LABEL
from trainer.errors import UserError
from trainer.evaluation.evaluator import Evaluator

_AT_ONCE = 64  # blocks


@dataclass(frozen=True)
class Baselines:
    """Losses in nats a token, over the labels that models are asked for.

    Attributes:
        vocabulary: V, tokens of the tokenizer.
        uniform: ln V, of guessing.
        unigram: Σ −ln q(label) / labels, where q is how frequent a token is in some text.
        unigram_of: which text.
    """

    vocabulary: int
    uniform: float
    unigram: float
    unigram_of: str

    def facts(self) -> dict[str, float | int | str]:
        """Write them by name."""
        return asdict(self)


def find_baselines(data: Data, evaluator: Evaluator) -> Baselines:
    """Compute the baselines of an evaluation of one term over the vocabulary.

    Frequencies are those of the training split, every token counted once more than it is there, or, where the data set
    has none, of the evaluated text itself. Tokens that are never asked for do not count: ids that no token has and, but
    for a causal model, special tokens.

    Raises:
        UserError: when nothing is asked for.
    """
    size, vocabulary = data.vocabulary.size, data.vocabulary
    never = [*vocabulary.unused_ids, *(() if data.config.objective.name == "clm" else vocabulary.special_ids)]
    asked = np.ones(size, bool)
    asked[never] = False
    text = data.training if data.training is not None else data.shards
    counts, is_all = token_counts(text.folder, size)
    seen = counts[asked] + (0 if is_all and data.training is None else 1)
    share = np.zeros(size)
    share[asked] = seen / seen.sum()
    labels = _labels(evaluator, data.config.objective.name, size)
    asked_for = labels > 0
    if not asked_for.any():
        raise UserError(
            "Nothing in the text is asked for: it has no tokens but special ones, such as the unknown token.",
            where=f"--data {data.config.data.validation_path}",
            remedy="Give text that the model's tokenizer knows.",
        )
    unigram = -float((labels[asked_for] * np.log(share[asked_for])).sum()) / int(labels.sum())
    which = "the training split" if data.training is not None else "the evaluated text"
    return Baselines(size, math.log(size), unigram, which if is_all else f"a part of {which}")


def _labels(evaluator: Evaluator, term: str, size: int) -> np.ndarray:
    """Count the labels of an evaluation by token: int64 [size]."""
    counts = np.zeros(size, np.int64)
    for first in range(0, evaluator.samples, _AT_ONCE):
        labels = evaluator.batch(np.arange(first, first + _AT_ONCE)).labels[term].numpy()
        counts += _count(labels[labels != IGNORED_LABEL], size)
    return counts


def _count(tokens: np.ndarray, size: int) -> np.ndarray:
    return np.bincount(tokens.reshape(-1), minlength=size).astype(np.int64)
