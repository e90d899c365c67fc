"""What a block is, before an objective makes a batch of it: tokens of the stream, and what is marked among them."""

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
    """How a data set is cut into blocks: block b is its tokens b·payload up to (b + 1)·payload."""

    payload: int

    def block_count(self, tokens: int) -> int:
        """Count the whole blocks in so many tokens; the tail that fills none is never read."""
        return tokens // self.payload


def framed_view(seq_len: int) -> View:
    """Make the view of which seq_len − 2 tokens are read; a begin and an end token are added."""
    return View(seq_len - 2)


class Blocks(NamedTuple):
    """What a loader has read.

    Attributes:
        tokens: [B, payload], any integer dtype.
        starts: name of a mark → bool [B, payload], True at the first token of each document (word, sentence): those
            that `Samples.marks` names.
    """

    tokens: np.ndarray
    starts: Mapping[str, np.ndarray] = MappingProxyType({})
