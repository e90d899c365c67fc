"""What gives a loss its meaning: that of guessing, and that of knowing how frequent tokens are."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np

from tools.evaluate.data import Data
from trainer.data.blocks import IGNORED_LABEL
from trainer.data.dataset import ShardSet
from trainer.evaluation.evaluator import Evaluator

_MOST_COUNTED, _STRETCH = 1 << 26, 4096  # tokens: of a larger data set as many, from all over it
_AT_ONCE = 64  # blocks, or stretches


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
    """
    size, vocabulary = data.vocabulary.size, data.vocabulary
    never = [*vocabulary.unused_ids, *(() if data.config.objective.name == "clm" else vocabulary.special_ids)]
    asked = np.ones(size, bool)
    asked[never] = False
    text = data.training if data.training is not None else data.shards
    counts, is_all = _frequencies(text, size)
    seen = counts[asked] + (0 if is_all and data.training is None else 1)
    share = np.zeros(size)
    share[asked] = seen / seen.sum()
    labels = _labels(evaluator, data.config.objective.name, size)
    asked_for = labels > 0
    unigram = -float((labels[asked_for] * np.log(share[asked_for])).sum()) / int(labels.sum())
    which = "the training split" if data.training is not None else "the evaluated text"
    return Baselines(size, math.log(size), unigram, which if is_all else f"a part of {which}")


def _frequencies(shards: ShardSet, size: int) -> tuple[np.ndarray, bool]:
    """Count each token, int64 [size], and tell whether all of the data was counted."""
    length = min(_STRETCH, shards.tokens)
    stretches = shards.block_count(length)
    step = max(1, math.ceil(stretches * length / _MOST_COUNTED))
    counts = np.zeros(size, np.int64)
    chosen = np.arange(0, stretches, step)
    for first in range(0, len(chosen), _AT_ONCE):
        counts += _count(shards.read_blocks(chosen[first : first + _AT_ONCE], length), size)
    rest = shards.tokens - stretches * length
    if rest:
        counts += _count(shards.read(np.array([stretches * length]), rest), size)
    return counts, step == 1


def _labels(evaluator: Evaluator, term: str, size: int) -> np.ndarray:
    """Count the labels of an evaluation by token: int64 [size]."""
    counts = np.zeros(size, np.int64)
    for first in range(0, evaluator.samples, _AT_ONCE):
        labels = evaluator.batch(np.arange(first, first + _AT_ONCE)).labels[term].numpy()
        counts += _count(labels[labels != IGNORED_LABEL], size)
    return counts


def _count(tokens: np.ndarray, size: int) -> np.ndarray:
    return np.bincount(tokens.reshape(-1), minlength=size).astype(np.int64)
