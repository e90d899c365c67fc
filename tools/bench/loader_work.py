"""What `bench loader` measures: its settings, and the data that every loader is given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from trainer.data.dataset import ShardSet
from trainer.data.order.sample_order import SampleOrder
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
    """

    data: str | None = None
    size_megabytes: int = 256
    seq_len: int = 512
    micro_size: int = 32
    against: str = "all"
    rounds: int = 5
    seconds: float = 1.0


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
