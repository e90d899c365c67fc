"""What a block is, before an objective makes a batch of it: tokens of the stream, and what is marked among them.

Blocks of a data set are equal stretches of its stream, or rows of whole documents (`trainer.data.rows`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

IGNORED_LABEL = -100  # torch.nn.functional.cross_entropy's ignore_index
DOCUMENT_STARTS = "doc"
"""A mark: where documents, or what a block holds of them, begin. Words and sentences have theirs in the manifest."""


@dataclass(frozen=True)
class View:
    """How a data set is cut into blocks.

    Attributes:
        payload: tokens of a block, without what an objective puts around them: block b is b·payload up to
            (b + 1)·payload.
        whole_documents: a block is a row of whole documents instead, of at most `payload` tokens.
        lookahead: tokens read beyond a block, which are those that the next one begins with.
        partner: whether beside each block another one of its source is read, see `Blocks.partner`.
    """

    payload: int
    whole_documents: bool = False
    lookahead: int = 0
    partner: bool = False

    def block_count(self, tokens: int) -> int:
        """Count the whole blocks in so many tokens; the tail that fills none is never read.

        Of rows that is an estimate, as if they were all full: `trainer.data.block_reader.block_count` counts them.
        """
        count = max(0, tokens - self.lookahead) // self.payload
        return max(1, count) if self.whole_documents and tokens else count


def framed_view(seq_len: int, whole_documents: bool = False) -> View:
    """Make the view of which seq_len − 2 tokens are read; a begin and an end token are added."""
    return View(seq_len - 2, whole_documents)


class Blocks(NamedTuple):
    """What a loader has read.

    Attributes:
        tokens: [B, payload + lookahead], any integer dtype; of rows [B, payload + 1], with the separators between
            documents.
        starts: name of a mark → bool of the same shape, True at the first token of each document (word, sentence):
            those that `Samples.marks` names.
        lengths: int64 [B], how many tokens a row shows; what follows them is of no meaning. None for equal stretches.
        cuts: bool [B, 2], whether a row begins, and whether it ends, within a document that is longer than a row. None
            for equal stretches.
        partner: of each block another one of the same source and, as far as they are there, as many tokens after it:
            [B, 2 · payload], with `lengths` up to which there is no token of the block itself. None where
            `View.partner` is not set.
    """

    tokens: np.ndarray
    starts: Mapping[str, np.ndarray] = MappingProxyType({})
    lengths: np.ndarray | None = None
    cuts: np.ndarray | None = None
    partner: Blocks | None = None
