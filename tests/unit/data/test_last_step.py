"""The last step of a run of epochs has what is left of them, on any number of ranks and in any micro-batches."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.unit.data.test_loader import OBJECTIVE, SEED, SEQ_LEN, folders, order_of  # noqa: F401  # a fixture
from trainer.config import BatchConfig, DataConfig, TrainConfig
from trainer.data.batch import Batch
from trainer.data.block_reader import BlockReader
from trainer.data.dataset import ShardSet
from trainer.data.loader import MicroBatches, SampledBlocks, TrainingBatches
from trainer.schedule.batch_plan import BatchPlan, plan_batch
from trainer.schedule.phases import lay_out

EPOCHS = 3
PREDICTIONS = OBJECTIVE.head_rows


def plan_of(blocks: int, world_size: int, micro_size: int) -> BatchPlan:
    batch = BatchConfig(global_size=24, micro_size=micro_size)
    phases = lay_out(DataConfig.model_validate({"train": "x", "seq_len": SEQ_LEN}), batch)
    return plan_batch(batch, TrainConfig(epochs=EPOCHS), phases, world_size, [blocks])


Row = tuple[tuple[int, ...], tuple[int, ...]]


def counted_rows(batches: list[Batch]) -> Counter[Row]:
    """(masked ids, labels) of the blocks that count in the loss."""
    rows: Counter[Row] = Counter()
    for batch in batches:
        labels = batch.labels["mlm"].view(len(batch.inputs["input_ids"]), -1).tolist()
        for ids, of_row in zip(batch.inputs["input_ids"].tolist(), labels, strict=True):
            assert all(label < 0 for label in of_row) or all(label >= 0 for label in of_row)
            if of_row[0] >= 0:
                rows[tuple(ids), tuple(of_row)] += 1
    return rows


@pytest.fixture
def source(folders: list[Path]) -> ShardSet:  # noqa: F811
    return ShardSet(folders[0])


@pytest.mark.parametrize(
    ("world_size", "micro_size", "workers"), [(1, 8, 0), (2, 4, 1), (3, 4, 0), (4, 2, 0), (8, 3, 0)]
)
def test_every_block_is_seen_exactly_as_often_as_there_are_epochs(
    source: ShardSet, world_size: int, micro_size: int, workers: int
) -> None:
    blocks, order = source.block_count(OBJECTIVE.view.payload), order_of([source])
    plan = plan_of(blocks, world_size, micro_size)
    assert plan.end_sample == EPOCHS * blocks and plan.end_sample % 24 not in (0, 8, 16), "the last step is smaller"
    seen: Counter[int] = Counter()
    samples: list[int] = []
    rows: Counter[Row] = Counter()
    for rank in range(world_size):
        places = list(MicroBatches(order, plan, [BlockReader(source, OBJECTIVE)], rank, 0, plan.total_steps))
        assert all(of_rank.shape == (micro_size, 3) for of_rank in places), "shapes are static"
        real = np.concatenate(places)
        real = real[real[:, 0] >= 0]
        seen.update(real[:, 2].tolist())
        samples += real[:, 0].tolist()
        batches = TrainingBatches(
            order,
            plan,
            SampledBlocks([source], OBJECTIVE, SEED),
            rank=rank,
            first_sample=0,
            steps=plan.total_steps,
            workers=workers,
            pin_memory=False,
        )
        rows += counted_rows(list(batches))
    assert sorted(samples) == list(range(plan.end_sample))
    assert seen == dict.fromkeys(range(blocks), EPOCHS)
    alone = plan_of(blocks, 1, 1)
    single = TrainingBatches(
        order,
        alone,
        SampledBlocks([source], OBJECTIVE, SEED),
        rank=0,
        first_sample=0,
        steps=alone.total_steps,
        workers=0,
        pin_memory=False,
    )
    assert rows == counted_rows(list(single)), "the same ids and masks, sample by sample"


def test_padding_has_no_predictions(source: ShardSet) -> None:
    places = np.array([[7, 0, 1], [-1, 0, 2]])
    batch = SampledBlocks([source], OBJECTIVE, SEED).__getitems__(places)
    assert isinstance(batch, Batch)
    assert batch.count("mlm") == PREDICTIONS
