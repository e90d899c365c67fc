"""Which tokens of a block are predicted, and what the model is shown in their place.

The masks of sample t are a pure function of (seed, t, position): new each time a block is visited, as the dynamic
masks of RoBERTa (Liu et al., arXiv:1907.11692), and the same whoever computes them. Exactly k positions a block are
predicted, as in BERT (Devlin et al., arXiv:1810.04805), so that every shape is static and every rank weighs the same.
Of a row that padding fills up a share of its text is predicted, in the same shape.

Words and what is made of them (`trainer.objectives.units`) are masked whole: the tokens of a unit share one hash, so
the k smallest are whole units in random order, the last of them as far as there is room. A word that does not fit is
given up, and at most k positions are predicted. Words come as often as in BERT's own way, which tries one after the
other in random order and takes what fits.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from trainer.data.blocks import IGNORED_LABEL, framed_view
from trainer.data.order.permutation import GOLDEN, KeyPurpose, UInt64s, fold_key, mix64_in_place
from trainer.objectives.units import break_at, group_words, last_start

# A block's draws are numbers of one SplitMix64 sequence, keyed by (seed, t): position p takes the p-th for its priority
# and, when it is chosen, the (2^16 + p)-th for what is shown.
_SECOND_DRAW = np.uint64(1 << 16)
_HASH_BITS = np.uint64(0xFFFF_FFFF_FFFF_0000)
_NEVER = np.uint64(0xFFFF_FFFF_FFFF_FFFF)  # the last priority
_NO_POSITION = 0xFFFF  # its position, past the end of every block
_HALF, _LOW_HALF = np.uint64(32), np.uint64(0xFFFF_FFFF)
_PIECE = 1 << 15  # positions hashed at once, in whole rows: 256 KiB an array, so that it stays in the cache


def predictions_per_block(mask_ratio: float, payload: int) -> int:
    """Compute k = round(mask_ratio · payload), at least 1: predictions in a block of `payload` content tokens."""
    return max(1, round(mask_ratio * payload))


@dataclass(frozen=True)
class _Units:
    """Of each token of some rows, uint16 [B, S]: where the unit starts that it is of, and where the word."""

    of_unit: NDArray[np.uint16]
    of_word: NDArray[np.uint16]


@dataclass(frozen=True)
class Masking:
    """Masks tokens, or whole words, each eligible one with the same chance.

    Of the predicted positions a share of `replace_mask` is shown as the mask token, a share of `replace_random` as a
    token drawn uniformly from the ordinary vocabulary, and the rest unchanged; each position draws for itself, or each
    unit for all of its own.

    Args:
        mask_ratio: share of a block's content tokens that is predicted, in (0, 1).
        later: other shares from a given sample on, as (first sample, share), ascending. Single tokens that a block
            predicts under a smaller share it predicts under a larger one as well.
        replace_mask, replace_random: shares in [0, 1] that sum to at most 1.
        lengths: where whole words are masked, shares of units of 1, 2, 3, … words; none for units of one word each.
        by_unit: whether a unit is replaced by one draw, as in SpanBERT.
        mask_id: id of the mask token.
        vocabulary_size: number of ids; every token is below it.
        special_ids: ids never predicted and never drawn: separators and block ends, and ids that no token has.
    """

    mask_ratio: float
    replace_mask: float
    replace_random: float
    mask_id: int
    vocabulary_size: int
    special_ids: tuple[int, ...]
    lengths: tuple[float, ...] = ()
    by_unit: bool = False
    later: tuple[tuple[int, float], ...] = ()
    _is_special: NDArray[np.bool_] = field(init=False, repr=False, compare=False)
    _ordinary_ids: NDArray[np.int64] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        is_special = np.zeros(self.vocabulary_size, np.bool_)
        is_special[list(self.special_ids)] = True
        object.__setattr__(self, "_is_special", is_special)
        object.__setattr__(self, "_ordinary_ids", np.flatnonzero(~is_special).astype(np.int64))
        assert len(self._ordinary_ids), "a vocabulary has ordinary tokens"

    def apply(
        self,
        tokens: NDArray[np.int64],
        samples: NDArray[np.uint64],
        seed: int,
        word_starts: NDArray[np.bool_] | None = None,
        contents: NDArray[np.int64] | None = None,
        payload: int | None = None,
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Mask blocks.

        Args:
            tokens: int64 [B, S], the begin and end token of each block in place; S ≤ 65,535. Left as it is.
            samples: uint64 [B], the sample number t of each block.
            seed: in [0, 2^64).
            word_starts: [B, S], True where the data are marked; None masks single tokens.
            contents: int64 [B], tokens of text of each block, of which a share is predicted; default `payload`.
            payload: that of a block full of text; default all but two.

        Returns:
            input_ids: int64 [B, S], what the model is shown.
            prediction_index: int64 [B·k], predicted positions in the flattened [B·S], ascending within a block; k is
                that of a block full of text with the largest share of them.
            labels: int64 [B·k], their original ids. A block in which fewer than k are predicted is filled up with label
                IGNORED_LABEL at its first position.
        """
        rows, seq_len = tokens.shape
        assert seq_len <= _NO_POSITION
        payload = payload or framed_view(seq_len).payload
        ratios = self._ratios(samples)
        counts = np.full(rows, payload) if contents is None else contents
        counts = np.maximum(1, np.rint(ratios * counts)).astype(np.int64)
        room = predictions_per_block(float(ratios.max(initial=0.0)), payload)
        keys = fold_key(KeyPurpose.MASKING, seed, samples)
        positions = np.empty((rows, room), np.int64)
        counters = np.empty((rows, room), np.uint64)
        piece_rows = max(1, _PIECE // seq_len)
        for start in range(0, rows, piece_rows):
            piece = slice(start, start + piece_rows)
            is_special = np.take(self._is_special, tokens[piece])
            units = None if word_starts is None else self._units(word_starts[piece], is_special, keys[piece])
            positions[piece] = chosen = self._choose(is_special, keys[piece], counts[piece], room, units)
            counters[piece] = chosen if units is None or not self.by_unit else _at(units.of_unit, chosen)

        row_starts = np.arange(0, rows * seq_len, seq_len)[:, None]
        missing = positions == _NO_POSITION
        prediction_index = np.where(missing, row_starts, row_starts + positions)
        labels = tokens.reshape(-1)[prediction_index]
        shown = self._replace(keys, counters, labels)
        input_ids = tokens.copy()
        if missing.any():  # single tokens of ordinary text are never
            labels[missing] = IGNORED_LABEL
            present = ~missing
            input_ids.reshape(-1)[prediction_index[present]] = shown[present]
        else:
            input_ids.reshape(-1)[prediction_index] = shown
        return input_ids, prediction_index.reshape(-1), labels.reshape(-1)

    def _ratios(self, samples: UInt64s) -> NDArray[np.float64]:
        """Look up the share that each sample predicts: [B]."""
        ratios = np.array([self.mask_ratio, *(ratio for _, ratio in self.later)])
        starts = np.array([start for start, _ in self.later], np.uint64)
        return ratios[np.searchsorted(starts, samples, side="right")]

    def _units(self, marks: NDArray[np.bool_], is_special: NDArray[np.bool_], keys: UInt64s) -> _Units:
        breaks = break_at(is_special)
        words = marks | breaks
        of_word = last_start(words)
        if not self.lengths:
            return _Units(of_word, of_word)
        return _Units(last_start(group_words(words, breaks, keys, self.lengths)), of_word)

    def _choose(
        self,
        is_special: NDArray[np.bool_],
        keys: UInt64s,
        counts: NDArray[np.int64],
        room: int,
        units: _Units | None,
    ) -> NDArray[np.uint16]:
        """Choose of each row the `counts` [B] eligible tokens with the smallest hashes, `room` at most.

        The low 16 bits of each hash give way to the position, so that partitioning the values yields the positions;
        the other 48 bits of two hashes tie in 1 of 2 billion blocks of 512.

        Returns:
            Their positions, ascending, uint16 [B, room]; missing ones are _NO_POSITION.
        """
        steps = np.arange(is_special.shape[1], dtype=np.uint64)
        priority = keys[:, None] + (steps if units is None else units.of_unit.astype(np.uint64)) * GOLDEN
        mix64_in_place(priority, np.empty_like(priority))
        np.bitwise_and(priority, _HASH_BITS, out=priority)
        np.bitwise_or(priority, steps, out=priority)
        np.putmask(priority, is_special, _NEVER)
        if units is not None and (too_long := _too_long(units.of_word, counts)) is not None:
            np.putmask(priority, too_long, _NEVER)
        priority.partition(room - 1, axis=1)
        chosen = priority[:, :room]
        if counts.min() < room:
            chosen = np.sort(chosen, axis=1)
            np.putmask(chosen, np.arange(room) >= counts[:, None], _NEVER)
        positions = chosen.astype(np.uint16)  # the low 16 bits
        if units is not None:
            _give_up_cut_words(positions, units.of_word, counts)
        positions.sort(axis=1)
        return positions

    def _replace(self, keys: UInt64s, counters: UInt64s, labels: NDArray[np.int64]) -> NDArray[np.int64]:
        """Choose what is shown at the predicted positions: int64 [B, k].

        The high half of a second hash chooses between mask, random and unchanged, the low half draws the random id
        (by multiply-shift, whose bias, vocabulary / 2^32, is below 1 in 10,000).

        Args:
            counters: uint64 [B, k], which number of the row's sequence each position takes.
        """
        draw = keys[:, None] + (counters + _SECOND_DRAW) * GOLDEN
        mix64_in_place(draw, np.empty_like(draw))
        choice = draw >> _HALF
        mask_below = np.uint64(round(self.replace_mask * 2**32))
        random_below = np.uint64(round(min(1.0, self.replace_mask + self.replace_random) * 2**32))
        rank = ((draw & _LOW_HALF) * np.uint64(len(self._ordinary_ids))) >> _HALF
        shown = np.where(choice < random_below, self._ordinary_ids[rank], labels)
        shown[choice < mask_below] = self.mask_id
        return shown


def _at(values: NDArray[np.uint16], positions: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """Look values [B, S] up at positions [B, k]; those that are missing give the row's first."""
    return np.take_along_axis(values, np.where(positions == _NO_POSITION, 0, positions).astype(np.intp), axis=1)


def _too_long(of_word: NDArray[np.uint16], counts: NDArray[np.int64]) -> NDArray[np.bool_] | None:
    """Find the tokens of words of more than `counts` [B] tokens, which can never be masked whole: [B, S], or None."""
    place = np.arange(of_word.shape[1], dtype=np.uint16) - of_word
    if place.max() < counts.min():
        return None
    rows, ends = np.nonzero(place == counts[:, None])
    is_long = np.zeros(of_word.shape, np.bool_)
    is_long[rows, of_word[rows, ends].astype(np.intp)] = True
    return np.take_along_axis(is_long, of_word.astype(np.intp), axis=1)


def _give_up_cut_words(positions: NDArray[np.uint16], of_word: NDArray[np.uint16], counts: NDArray[np.int64]) -> None:
    """Make positions missing that belong to a word of which not all tokens were chosen.

    Only the last of a row's positions can be in such a word: the tokens of a unit come in the order of their places.

    Args:
        positions: uint16 [B, k], in the order of their priority, but for those before the last of `counts` [B]; changed
            in place.
    """
    rows = np.arange(len(positions))
    last = positions[rows, counts - 1].astype(np.intp)
    inside = last < of_word.shape[1] - 1
    last = np.where(inside, last, 0)
    is_cut = inside & (of_word[rows, last + 1] == of_word[rows, last])
    first = of_word[rows, last]
    within = (positions >= first[:, None]) & (positions <= last[:, None])
    positions[is_cut[:, None] & within] = _NO_POSITION
