"""Whether data give pairs of segments, where an objective tells them: said, or refused, before a run begins."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainer.config import Config
from trainer.data.batch import Samples
from trainer.data.block_reader import BlockReader
from trainer.data.dataset import ShardSet
from trainer.data.order.sample_order import SampleOrder
from trainer.errors import UserError

MANY_WITHOUT_PAIR = 0.3
_LOOKED_AT = 1024  # blocks


def describe_pairs(config: Config, sources: Sequence[ShardSet], objective: Samples, order: SampleOrder) -> str:
    """Say how many of a phase's first blocks have no pair, with a remedy where many have none.

    Args:
        objective, order: of the phase.
    """
    assert config.objective.pair is not None
    task, samples = config.objective.pair.task, np.arange(_LOOKED_AT)
    number_of_source, *blocks = order.locate(samples)
    if objective.view.partner:
        blocks.append(order.partners(samples))
    labels = 0
    for source in np.unique(number_of_source).tolist():
        rows = np.flatnonzero(number_of_source == source)
        read = BlockReader(sources[source], objective).read_marks(*(each[rows] for each in blocks))
        labels += objective.make_batch(read, rows.astype(np.uint64), config.run.seed).count(task)
    ignored = 1 - labels / _LOOKED_AT
    line = f"pairs: {task}; {ignored:.1%} of the blocks of {objective.seq_len} have none, and no label"
    if ignored > MANY_WITHOUT_PAIR:
        line += (
            ": TOO FEW SENTENCES START WITHIN A DOCUMENT. Longer documents, a larger data.seq_len, or other "
            "--sentence-starts give more"
        )
    return line


def refuse_single_block(blocks: int, objective: Samples, which: str, where: str) -> None:
    """Refuse data in which no block has another one beside it, where that is to be read.

    From two blocks on there are pairs; how few are worth it is left to the user, as with epochs over little data.

    Raises:
        UserError: for data of one block; none at all are refused elsewhere.
    """
    if objective.view.partner and blocks == 1:
        raise UserError(
            f"The {which} is one block of {objective.seq_len} tokens, and a sentence from elsewhere has to come from "
            "another block.",
            where=f"objective.pair.task=nsp, {where}",
            remedy="Prepare more text, lower data.seq_len, or set objective.pair.task=sop, which needs no other block.",
        )
