"""How much a document resembles a target: hashed n-gram importance (DSIR, Xie et al., arXiv:2302.03169).

Words and pairs of words that follow each other are hashed into a fixed number of buckets. Of the target and of the
corpus the frequency of each bucket is taken, q and p, and a document weighs

    log w = Σ_j count_j · log(q_j / p_j),

by how much likelier its words are in the target. Documents drawn with chances in proportion to w are distributed as the
target is, as far as buckets tell. The largest log w + g, with g from the standard Gumbel distribution, are such a draw
without replacement (section 3.2 there).
"""

from __future__ import annotations

import re
import zlib

import numpy as np
from numpy.typing import NDArray

from trainer.data.order.permutation import GOLDEN, mix64_in_place

BUCKETS = 10_000
"""As in the paper."""
# A word; a character of a script that has no blanks between words; a run of punctuation.
_WORD = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|\w+|[^\w\s]+")
_OF_PAIRS = np.uint64(0x9E6C63D0876A9B1F)  # tells a pair's hash from a word's


def buckets_of(text: str) -> NDArray[np.int64]:
    """Hash the words of a text, in lower case, and its pairs of words: [words + pairs], each in [0, BUCKETS)."""
    words = np.fromiter((zlib.crc32(word.encode()) for word in _WORD.findall(text.lower())), np.uint64)
    pairs = words[:-1] * GOLDEN + words[1:] + _OF_PAIRS
    hashes = np.concatenate([words, pairs])
    mix64_in_place(hashes, np.empty_like(hashes))
    return (hashes % np.uint64(BUCKETS)).astype(np.int64)


def log_ratios(target: NDArray[np.int64], corpus: NDArray[np.int64]) -> NDArray[np.float64]:
    """Compute log(q / p) of each bucket, from counts [BUCKETS].

    A target is small, and most buckets are not in it: it counts as if BUCKETS words drawn from the corpus came on top
    (a Dirichlet prior), where the paper adds 1e-8. So what the target lacks speaks against a document a little, and not
    more than all that speaks for it.
    """
    p = (corpus + 1) / (corpus.sum() + BUCKETS)
    q = (target + BUCKETS * p) / (target.sum() + BUCKETS)
    return np.log(q / p)
