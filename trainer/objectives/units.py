"""Which tokens are masked together: words, n-grams of words, spans of words.

A unit is the run of tokens from one that starts it to the next. What starts a word is marked when the data are
prepared (`trainer.data.token_marks`); n-grams and spans are words taken together, of lengths drawn anew at each visit:

- **word**: whole-word masking (Devlin et al., google-research/bert; Cui et al., arXiv:1906.08101 for Chinese).
- **ngram**: one to three words, n with a chance in proportion to 1/n (ALBERT, Lan et al., arXiv:1909.11942).
- **span**: one to ten words, of geometric length with p = 0.2 (SpanBERT, Joshi et al., arXiv:1907.10529).

A row of a block is cut into units from one end to the other, and whole units are then chosen: no span has to be placed
between others, and each word has the same chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from trainer.data.order.permutation import GOLDEN, UInt64s, mix64_in_place

NGRAM_LENGTHS = tuple(1 / n for n in range(1, 4))
SPAN_LENGTHS = tuple(0.2 * 0.8 ** (n - 1) for n in range(1, 11))
LENGTHS: dict[str, tuple[float, ...]] = {"token": (), "word": (), "ngram": NGRAM_LENGTHS, "span": SPAN_LENGTHS}
"""Shares of units of 1, 2, 3, … words, by the name of a scheme."""
# A block's draws are numbers of one SplitMix64 sequence (`trainer.objectives.masking` has the first 2^17 of them): the
# length of the unit j is the (3·2^16 + j)-th, and the shift of the first unit the one before these.
_LENGTH_DRAWS = np.uint64(3 << 16)


def break_at(is_special: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Find where every unit ends, whatever is marked: bool [B, S], True at special tokens, and at what follows them.

    The first of a row is one. So no unit goes on from one document into the next.

    Args:
        is_special: [B, S], True at begin, end and separator tokens.
    """
    breaks = is_special.copy()
    breaks[:, 1:] |= is_special[:, :-1]
    breaks[:, 0] = True
    return breaks


def group_words(
    starts: NDArray[np.bool_], breaks: NDArray[np.bool_], keys: UInt64s, lengths: Sequence[float]
) -> NDArray[np.bool_]:
    """Take words together: [B, S], True where a unit starts, which is where a word starts.

    Lengths are drawn for the row from its left end on, and the whole is shifted to the left by a drawn offset, so that
    no place of a row is more often than another in a long unit, or cut by the row's ends.

    Args:
        starts: [B, S], True where a word starts, and where `breaks` is.
        breaks: [B, S], where a unit starts in any case.
        keys: [B], of the samples.
        lengths: shares of units of 1, 2, 3, … words; they need not add up to 1.
    """
    places, counts = np.flatnonzero(starts), np.count_nonzero(starts, axis=1)  # of words
    borders = _draw_borders(keys, tuple(lengths), int(counts.max()))
    inside = (borders > 0) & (borders < counts[:, None])
    first = np.cumsum(counts) - counts
    units = breaks.copy()
    units.reshape(-1)[places[(borders + first[:, None])[inside]]] = True
    return units


def _draw_borders(keys: UInt64s, lengths: tuple[float, ...], words: int) -> NDArray[np.intp]:
    """Draw where units start in rows of so many words, as numbers of words: intp [B, n], ascending from 0 or below on.

    The last of each row is beyond the last word. As many lengths are drawn as that takes.
    """
    longest, mean = len(lengths), np.average(np.arange(1, len(lengths) + 1), weights=lengths)
    count = int(1.2 * (words + longest) / mean) + longest
    while True:
        draws = keys[:, None] + (_LENGTH_DRAWS + np.arange(-1, count, dtype=np.int64).astype(np.uint64)) * GOLDEN
        mix64_in_place(draws, np.empty_like(draws))
        drawn = (draws >> np.uint64(48)).astype(np.intp)  # 16 bits: a share is right to 1 in 65,536
        offset = drawn[:, :1] * longest >> 16
        borders = np.cumsum(np.take(_length_table(lengths), drawn[:, 1:]), axis=1, dtype=np.intp) - offset
        if borders[:, -1].min() >= words:
            return borders
        count *= 2


@lru_cache(maxsize=8)
def _length_table(lengths: tuple[float, ...]) -> NDArray[np.uint8]:
    """Make the table of the length that each draw of 16 bits stands for: [65536]."""
    chances = np.round(np.cumsum(lengths) / np.sum(lengths) * 65536)
    return (1 + np.searchsorted(chances[:-1], np.arange(65536), side="right")).astype(np.uint8)


def last_start(starts: NDArray[np.bool_]) -> NDArray[np.uint16]:
    """Find for each token the position where its word, or unit, starts: uint16 [B, S]."""
    positions = np.arange(starts.shape[1], dtype=np.uint16)
    return np.maximum.accumulate(starts * positions, axis=1)
