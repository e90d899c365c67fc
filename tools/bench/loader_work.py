"""What `bench loader` measures: its settings, and the data that every loader is given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from trainer.data.block_reader import BlockReader
from trainer.data.dataset import ShardSet
from trainer.data.manifest import WORD_STARTS
from trainer.data.order.sample_order import SampleOrder
from trainer.objectives.framing import Framed, frame_block
from trainer.objectives.mlm import MaskedSamples
from trainer.schedule.batch_plan import BatchPlan


@dataclass(frozen=True)
class LoaderBenchmark:
    """What `bench loader` is asked to measure.

    Attributes:
        data: a prepared data set; None writes one of `size_megabytes` MB of random tokens to a temporary folder.
        micro_size: sequences a batch.
        against: "all", "hf" (Hugging Face), "mds" (mosaicml-streaming) or "none".
        seconds: of each repetition.
        scheme: `objective.scheme`; with one of words the loader of single tokens is measured beside it.
    """

    data: str | None = None
    size_megabytes: int = 256
    seq_len: int = 512
    micro_size: int = 32
    against: str = "all"
    rounds: int = 5
    seconds: float = 1.0
    scheme: Literal["token", "word", "ngram", "span"] = "token"


@dataclass(frozen=True)
class Workload:
    """The data and the sizes that all variants work on."""

    shards: ShardSet
    tokenizer: PreTrainedTokenizerFast
    objective: MaskedSamples
    order: SampleOrder
    plan: BatchPlan
    seconds: float
    scratch: Path

    @property
    def reads_words(self) -> bool:
        """Whether whole words are masked."""
        return WORD_STARTS in self.objective.marks

    def read(self, blocks: NDArray[np.int64]) -> Framed:
        """Read blocks with begin and end tokens in place, int64 [B, seq_len], and what is marked in them."""
        return frame_block(BlockReader(self.shards, self.objective).read(blocks), self.objective.vocabulary)
