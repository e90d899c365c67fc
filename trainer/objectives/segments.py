"""How a block becomes a pair of segments: next-sentence prediction (nsp) and sentence order (sop).

    nsp (BERT, Devlin et al., arXiv:1810.04805): B follows A in the text, or is from another place.
    sop (ALBERT, Lan et al., arXiv:1909.11942): two stretches that follow each other stand in their order, or not.

A block is cut at a border: where a sentence starts within a document. Which one, and which label, are draws of
(seed, t). A label is to be told by what a text says, so under both labels segments have the same lengths, and begin and
end alike; of short documents the places of their separators still tell a little (docs/decisions.md):

- nsp: A ends at a border and B begins at one, its own or one of another block, and both B end where the row is full.
- sop: a block begins and ends within a sentence. So what is before its first border stays in front, what is after its
  last one stays at the end, and the two stretches between them, of whole sentences, stand in their order or not.

Whether a block has a label does not depend on what the label would be. One without is all in A, and B is empty.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.data.blocks import IGNORED_LABEL
from trainer.data.order.permutation import GOLDEN, UInt64s, mix64

NATURAL, CHANGED = 0, 1
"""Labels, as in transformers: B follows A, or stands in its order; and not."""
# A row's draws are numbers of one SplitMix64 sequence, keyed by (seed, t).
_LABEL, _BORDER, _PARTNERS_BORDER = range(3)


class Segments(NamedTuple):
    """Pairs of segments, of P tokens together.

    Attributes:
        tokens: int64 [B, P], the tokens of A and then of B, as places in the block; P and more are places in what was
            read of the partner.
        first: int64 [B], tokens of A.
        labels: int64 [B], NATURAL, CHANGED or IGNORED_LABEL.
    """

    tokens: NDArray[np.int64]
    first: NDArray[np.int64]
    labels: NDArray[np.int64]


def borders_in(sentences: NDArray[np.bool_], documents: NDArray[np.bool_], payload: int) -> NDArray[np.bool_]:
    """Find where a block may be cut, bool [B, payload]: at the sentences that start in it, but for first ones.

    The first of a document follows on nothing, and so does, as far as is known, that at a block's first token.

    Args:
        sentences, documents: [B, payload or more], True where they start.
    """
    borders = sentences[:, :payload] & ~documents[:, :payload]
    borders[:, 0] = False
    return borders


def next_segments(
    borders: NDArray[np.bool_], partner_borders: NDArray[np.bool_], partner_lengths: NDArray[np.int64], keys: UInt64s
) -> Segments:
    """Cut blocks at one of their borders, and put in every second B's place what follows a border of the partner.

    Args:
        borders, partner_borders: bool [B, P], of the block and of its partner.
        partner_lengths: int64 [B], tokens that were read from the partner's first one on; B has to lie within.
        keys: uint64 [B], of the samples.
    """
    rows, payload = borders.shape
    places = np.arange(payload)
    border, is_cut = _choose(borders, _draw(keys, _BORDER))
    # Where a partner's text ends early, only borders that leave room for B.
    last = partner_lengths - (payload - border)
    begin, is_there = _choose(partner_borders & (places <= last[:, None]), _draw(keys, _PARTNERS_BORDER))
    is_pair = is_cut & is_there
    labels = _labels(keys, is_pair)
    index = np.broadcast_to(places, (rows, payload)).copy()
    moved = (labels == CHANGED)[:, None] & (places >= border[:, None])
    index += moved * (payload + begin - border)[:, None]
    return Segments(index, np.where(is_pair, border, payload), labels)


def ordered_segments(borders: NDArray[np.bool_], keys: UInt64s) -> Segments:
    """Cut what is between a block's first and last border at another one, and change every second time its halves.

    Args:
        borders: bool [B, P].
        keys: uint64 [B], of the samples.
    """
    rows, payload = borders.shape
    places = np.arange(payload)
    start, end = np.argmax(borders, axis=1), payload - 1 - np.argmax(borders[:, ::-1], axis=1)
    border, is_pair = _choose(borders & (places > start[:, None]) & (places < end[:, None]), _draw(keys, _BORDER))
    labels = _labels(keys, is_pair)
    changed = (labels == CHANGED)[:, None]
    middle = start + end - border  # where the halves meet when they are changed
    index = np.broadcast_to(places, (rows, payload)).copy()
    before = changed & (places >= start[:, None]) & (places < middle[:, None])
    after = changed & (places >= middle[:, None]) & (places < end[:, None])
    index += before * (border - start)[:, None] - after * (end - border)[:, None]
    first = np.where(labels == CHANGED, middle, border)
    return Segments(index, np.where(is_pair, first, payload), labels)


def whole_segments(rows: int, payload: int) -> Segments:
    """Cut blocks in their middle, wherever that is, without a change: for what only wants the shapes."""
    index = np.broadcast_to(np.arange(payload), (rows, payload))
    return Segments(index, np.full(rows, payload // 2), np.full(rows, NATURAL))


def _choose(allowed: NDArray[np.bool_], draws: UInt64s) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Choose one of the allowed places of each row, each with the same chance.

    Returns:
        int64 [B], 0 where there is none, and bool [B], where there is one.
    """
    counts = np.count_nonzero(allowed, axis=1)
    rank = (draws % np.maximum(counts, 1).astype(np.uint64)).astype(np.int64)
    return np.argmax(np.cumsum(allowed, axis=1) > rank[:, None], axis=1), counts > 0


def _labels(keys: UInt64s, is_pair: NDArray[np.bool_]) -> NDArray[np.int64]:
    is_changed = _draw(keys, _LABEL) >> np.uint64(63) != 0
    return np.where(is_pair, np.where(is_changed, CHANGED, NATURAL), IGNORED_LABEL)


def _draw(keys: UInt64s, number: int) -> UInt64s:
    return mix64(keys + np.array([number], np.uint64) * GOLDEN)
