from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import BatchConfig, DataConfig, TrainConfig
from trainer.errors import UserError
from trainer.schedule.batch_plan import BatchPlan, plan_batch
from trainer.schedule.phases import lay_out


def plan(
    global_size: int = 256,
    micro_size: int = 8,
    world_size: int = 1,
    seq_len: int = 512,
    epoch_blocks: int = 1000,
    **length: float,
) -> BatchPlan:
    batch = BatchConfig(global_size=global_size, micro_size=micro_size)
    phases = lay_out(DataConfig.model_validate({"train": "data", "seq_len": seq_len}), batch)
    return plan_batch(batch, TrainConfig.model_validate(length or {"steps": 10}), phases, world_size, [epoch_blocks])


sizes = st.integers(1, 64)


@given(micro_size=sizes, world_size=sizes, accumulation=sizes)
def test_a_batch_that_divides_is_split_evenly(micro_size: int, world_size: int, accumulation: int):
    found = plan(micro_size * world_size * accumulation, micro_size, world_size)
    assert found.accumulation == accumulation
    assert found.rank_size * world_size == found.global_size
    assert found.tokens_per_step == found.global_size * 512


@given(global_size=st.integers(1, 4096), micro_size=sizes, world_size=sizes)
def test_a_batch_is_refused_exactly_when_it_does_not_divide(global_size: int, micro_size: int, world_size: int):
    if global_size % (micro_size * world_size) == 0:
        plan(global_size, micro_size, world_size)
    else:
        with pytest.raises(UserError, match="does not divide"):
            plan(global_size, micro_size, world_size)


@pytest.mark.parametrize(
    ("global_size", "micro_size", "world_size", "remedy"),
    [
        (250, 8, 2, "Set batch.global_size to 240 or 256, or batch.micro_size to one of [1, 5, 25, 125]."),
        (10, 4, 3, "Set batch.global_size to 12."),
        (7, 2, 1, "Set batch.global_size to 6 or 8, or batch.micro_size to one of [1, 7]."),
    ],
)
def test_the_remedy_offers_only_what_works(global_size: int, micro_size: int, world_size: int, remedy: str):
    with pytest.raises(UserError) as caught:
        plan(global_size, micro_size, world_size)
    assert caught.value.remedy == remedy
    assert caught.value.where == f"batch.global_size={global_size}, batch.micro_size={micro_size}, ranks={world_size}"


@pytest.mark.parametrize(
    ("length", "steps"),
    [
        ({"steps": 7}, 7),
        ({"tokens": 1}, 1),
        ({"tokens": 16 * 512}, 1),
        ({"tokens": 16 * 512 + 1}, 2),
        ({"tokens": 10**12}, 122_070_313),
        ({"epochs": 1}, 63),  # 1,000 blocks by 16
        ({"epochs": 0.016}, 1),
        ({"epochs": 0.0001}, 1),
        ({"epochs": 2.5}, 157),
    ],
)
def test_the_number_of_steps_is_rounded_up(length: dict[str, float], steps: int):
    found = plan(16, 4, **length)
    assert found.total_steps == steps
    if "epochs" in length:
        assert found.end_sample == math.ceil(1000 * length["epochs"]), "the last step is smaller"
    else:
        assert found.end_sample == steps * 16


@given(epochs=st.floats(0.01, 100), blocks=st.integers(1, 10**6), batch=st.integers(1, 512))
def test_epochs_are_covered_and_not_by_a_step_too_many(epochs: float, blocks: int, batch: int):
    found = plan(batch, 1, epoch_blocks=blocks, epochs=epochs)
    assert found.end_sample == math.ceil(Fraction(str(epochs)) * blocks)
    assert (found.total_steps - 1) * batch < found.end_sample <= found.total_steps * batch


def test_the_description_shows_the_arithmetic():
    assert plan(256, 8, 4).describe() == (
        "256 sequences a step = 8 micro × 4 ranks × 8 accumulation; 131,072 tokens a step, 10 steps"
    )
