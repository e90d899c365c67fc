"""Engines of several layouts, one after the other in the same ranks, to compare what `plan` says of them with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from trainer.config import Config
from trainer.config.file import parse_config
from trainer.data.tokenizer import Vocabulary
from trainer.engine.deepspeed_config import compose, load_preset
from trainer.engine.engine import TrainingEngine
from trainer.model.teacher import load_teacher
from trainer.model.trained import build_trained
from trainer.objectives.objective import loss_sums
from trainer.objectives.registry import family_of, make_criterion, make_samples
from trainer.runtime.distributed import World
from trainer.schedule.batch_plan import BatchPlan
from trainer.sizing.made_up import made_up_batch
from trainer.sizing.memory_estimate import MemoryEstimate

SEQ_LEN = 128
VOCABULARY_SIZE = 8000


@dataclass(frozen=True)
class EngineLayout:
    """A ZeRO stage, a precision, a micro-batch, changes to the preset; and what is trained."""

    stage: int
    precision: str
    accumulation: int
    micro_size: int = 1
    changes: dict[str, Any] = field(default_factory=dict)
    gradient_accumulation_dtype: str | None = None
    model: str = "roberta-base"
    objective: dict[str, Any] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    optimizer: str = "adamw"

    def preset(self) -> dict[str, Any]:
        preset = load_preset(f"zero{self.stage}")
        return {**preset, "zero_optimization": {**preset["zero_optimization"], **self.changes}}

    def config(self, **overrides: int) -> Config:
        raw = {
            "run": {"dir": "unused"},
            "model": {
                "preset": self.model,
                "tokenizer": "unused",
                "overrides": overrides,
                "frozen": list(self.frozen),
            },
            "objective": self.objective,
            "optimizer": {"name": self.optimizer},
            "data": {"train": "unused", "seq_len": SEQ_LEN},
            "batch": {"global_size": 1},
            "train": {
                "steps": 1,
                "precision": self.precision,
                "gradient_accumulation_dtype": self.gradient_accumulation_dtype,
            },
            "deepspeed": f"zero{self.stage}",
        }
        return parse_config(raw, "test")

    def estimate(self, **overrides: int) -> MemoryEstimate:
        return MemoryEstimate(self.config(**overrides), vocabulary(), self.preset(), "cpu")


def vocabulary() -> Vocabulary:
    return Vocabulary(VOCABULARY_SIZE, 0, 2, 2, VOCABULARY_SIZE - 1, 1, (0, 1, 2, 3, VOCABULARY_SIZE - 1), "")


@contextmanager
def steps_of(layout: EngineLayout, world: World, **overrides: int) -> Iterator[Callable[[], None]]:
    """A function that does one optimizer step of made-up tokens."""
    config = layout.config(**overrides)
    batch = made_up_batch(make_samples(config, vocabulary(), SEQ_LEN), layout.micro_size, token=10)
    criterion = make_criterion(config, taught_by=load_teacher(config, vocabulary(), family_of(config), world.device))
    micro_size, accumulation = layout.micro_size, layout.accumulation
    plan = BatchPlan(micro_size * accumulation * world.size, micro_size, world.size, accumulation, SEQ_LEN, 1)
    built = build_trained(config, vocabulary(), family_of(config))
    engine = TrainingEngine(built, compose(config, layout.preset(), plan), config.optimizer, world)
    del built

    def step() -> None:
        for _ in range(accumulation):
            engine.backward(loss_sums(criterion, engine.network, batch, 1).sum() / batch.head_rows)
            engine.step(1e-4)

    try:
        yield step
    finally:
        engine.close()
