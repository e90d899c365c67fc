"""Batches of made-up tokens, for a step of which only shapes and memory count."""

from __future__ import annotations

import numpy as np

from trainer.data.batch import Batch, Samples
from trainer.data.blocks import Blocks


def made_up_batch(samples: Samples, micro_size: int, token: int = 0) -> Batch:
    """Make a batch of blocks of one token, each one document, which is the longest that there may be."""
    shape = (micro_size, samples.view.payload + samples.view.lookahead)
    starts = {mark: np.zeros(shape, np.bool_) for mark in samples.marks}
    return samples.plain(Blocks(np.full(shape, token), starts))
