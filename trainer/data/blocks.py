"""What a block is, before an objective makes a batch of it: tokens of the stream, and what is marked among them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

IGNORED_LABEL = -100  # torch.nn.functional.cross_entropy's ignore_index
DOCUMENT_STARTS = "doc"  # where documents begin, in `Blocks.starts`; beside it the marks of `trainer.data.token_marks`


@dataclass(frozen=True)
class View:
    """Which tokens of a data set's stream block b is: [b · payload, (b + 1) · payload)."""

    payload: int

    def block_count(self, tokens: int) -> int:
        """Whole blocks in so many tokens; the tail that fills none is never read."""
        return tokens // self.payload


def framed_view(seq_len: int) -> View:
    """Blocks of `seq_len` tokens whose first and last are put around what is read: begin and end."""
    return View(seq_len - 2)


class Blocks(NamedTuple):
    """What a loader has read.

    Attributes:
        tokens: [B, payload], any integer dtype.
        starts: by mark bool [B, payload], True where one starts; those that `Samples.marks` names.
    """

    tokens: np.ndarray
    starts: Mapping[str, np.ndarray] = MappingProxyType({})
