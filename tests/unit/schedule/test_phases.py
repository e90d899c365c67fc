"""Phases and batch warm-up: whatever the sizes, steps follow each other without a gap and keep to phases."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import BatchConfig, DataConfig, RopeTheta, TrainConfig
from trainer.errors import UserError
from trainer.schedule.batch_plan import BatchPlan, plan_batch
from trainer.schedule.phases import Phases, lay_out, with_thetas


def configs(
    batch: dict[str, Any], phases: list[dict[str, int]] | None = None, seq_len: int = 32
) -> tuple[BatchConfig, Phases]:
    size = BatchConfig.model_validate({"micro_size": 1, **batch})
    return size, lay_out(DataConfig.model_validate({"train": "x", "seq_len": seq_len, "phases": phases or []}), size)


def plan(
    batch: dict[str, Any],
    phases: list[dict[str, int]] | None = None,
    world_size: int = 1,
    blocks: list[int] | None = None,
    **length: float,
) -> BatchPlan:
    sizes, laid = configs(batch, phases)
    train = TrainConfig.model_validate(length or {"steps": 20})
    return plan_batch(sizes, train, laid, world_size, blocks or [100] * len(laid))


def steps_of(found: BatchPlan, first: int = 0, steps: int | None = None) -> list[tuple[int, int, int]]:
    """(first sample, sequences, seq_len) of each step, asked for one by one."""
    result, sample = [], first
    for _ in range(found.total_steps if steps is None else steps):
        shape = found.shape_at(sample)
        room, a_pass = shape.rank_size * shape.world_size, shape.micro_size * shape.world_size
        assert shape.global_size <= room < shape.global_size + a_pass, "no micro-batch is all padding on every rank"
        result.append((sample, shape.global_size, shape.seq_len))
        sample += shape.global_size
    return result


GROWING = {"global_size": 24, "warmup": {"start_size": 8, "tokens": 1600}}
SHORT_FIRST = [{"seq_len": 16, "until_tokens": 3800}]


def test_a_phase_has_a_rate_and_a_theta_of_its_own_and_else_those_of_the_last():
    short = {"seq_len": 16, "until_tokens": 160}
    data = DataConfig.model_validate(
        {
            "train": "x",
            "seq_len": 32,
            "phases": [
                {**short, "lr_factor": 0.5, "rope_theta": 10_000},
                {**short, "until_tokens": 320, "local_rope_theta": 500},
            ],
        }
    )
    laid = with_thetas(lay_out(data, BatchConfig(global_size=10)), data, RopeTheta(160_000, 10_000))
    assert [phase.lr_factor for phase in laid] == [0.5, 1, 1]
    thetas = [RopeTheta(10_000, 10_000), RopeTheta(160_000, 500), RopeTheta(160_000, 10_000)]
    assert [phase.rope_theta for phase in laid] == thetas
    after = {0: 0, 1: 0, 10: 0, 11: 1, 20: 1, 21: 2, 10**6: 2}  # samples done → phase of the last of them
    assert {samples: laid.rope_theta_after(samples) for samples in after} == {k: thetas[v] for k, v in after.items()}
    assert laid.evaluated_at(10) == {"eval/seq_len": 32, "eval/rope_theta": 10_000, "eval/local_rope_theta": 10_000}
    assert lay_out(data, BatchConfig()).evaluated_at(10) == {"eval/seq_len": 32}, "where theta does not change"
    assert configs({})[1].evaluated_at(10) == {}, "nor anything else"


def test_a_run_worked_out_by_hand():
    """8 sequences up to token 800 (sample 50), 16 up to token 1,600 (sample 100), then 24; 240 short blocks."""
    found = plan(GROWING, SHORT_FIRST)
    assert [size for _, size, _ in steps_of(found)] == [8] * 7 + [16] * 3 + [24] * 5 + [16] + [24] * 4
    assert [seq_len for _, _, seq_len in steps_of(found)] == [16] * 16 + [32] * 4
    assert [first for first, _, _ in steps_of(found)][16] == 240
    assert found.end_sample == 240 + 4 * 24
    _, phases = configs(GROWING, SHORT_FIRST)
    assert [(phase.first_sample, phase.end_sample) for phase in phases] == [(0, 240), (240, None)]
    assert (phases.tokens(240), phases.tokens(241), phases.sample_at(3840), phases.sample_at(3841)) == (
        3840,
        3872,
        240,
        241,
    )


def test_without_phases_and_warm_up_every_step_is_the_same():
    found = plan({"global_size": 24})
    assert not found.earlier
    assert steps_of(found, steps=3) == [(0, 24, 32), (24, 24, 32), (48, 24, 32)]
    assert next(found.runs(7)).steps > 10**18


runs = st.fixed_dictionaries(
    {
        "unit": st.integers(1, 4),
        "start": st.integers(1, 4),
        "growth": st.integers(0, 6),
        "tokens": st.integers(1, 20_000),
        "phases": st.lists(st.tuples(st.integers(8, 32), st.integers(1, 9000), st.integers(0, 6)), max_size=4),
    }
)


def drawn_plan(drawn: dict[str, Any], **length: float) -> tuple[BatchPlan, Phases]:
    unit, start = drawn["unit"], drawn["start"]
    batch: dict[str, Any] = {"global_size": unit * start * (1 + drawn["growth"])}
    if drawn["growth"]:
        batch["warmup"] = {"start_size": unit * start, "tokens": drawn["tokens"]}
    phases, until = [], 0
    for seq_len, more, size in drawn["phases"]:
        until += more
        phases.append({"seq_len": seq_len, "until_tokens": until} | ({"global_size": unit * size} if size else {}))
    found = plan(batch, phases, world_size=unit, **length)
    return found, configs(batch, phases)[1]


@given(drawn=runs)
def test_no_sample_is_lost_or_doubled_and_no_step_crosses_a_phase(drawn: dict[str, Any]):
    found, phases = drawn_plan(drawn, steps=300)
    singly = steps_of(found)
    together = [
        (run.first_sample + number * run.shape.global_size, run.shape.global_size, run.shape.seq_len)
        for run in found.runs(0, 300)
        for number in range(run.steps)
    ]
    assert together == singly, "runs of equal steps are the steps"
    sizes = [size for _, size, _ in singly]
    ends = {phase.end_sample for phase in phases}
    for first, size, seq_len in singly:
        phase = phases[phases.number_at(first)]
        assert seq_len == phase.seq_len and size <= phase.global_size
        assert phase.end_sample is None or first + size <= phase.end_sample
        assert size % drawn["unit"] == 0
    if not any(size for _, _, size in drawn["phases"]):
        grown = [size for (first, size, _) in singly if first + size not in ends]
        assert grown == sorted(grown), "but for the rest of a phase the batch never shrinks"
    assert found.end_sample == sum(sizes)
    assert found.tokens_ahead(0, 300) == phases.tokens(sum(sizes))


@given(drawn=runs, cut=st.integers(0, 250))
def test_a_resume_goes_on_with_the_same_steps(drawn: dict[str, Any], cut: int):
    found, _ = drawn_plan(drawn, steps=300)
    singly = steps_of(found)
    assert steps_of(found, singly[cut][0], 300 - cut) == singly[cut:]


@given(drawn=runs, tokens=st.integers(1, 60_000), epochs=st.integers(1, 400))
def test_the_length_is_the_fewest_steps_that_reach_it(drawn: dict[str, Any], tokens: int, epochs: int):
    found, phases = drawn_plan(drawn, tokens=tokens)
    last_begins = found.end_sample - steps_of(found)[-1][1]
    assert phases.tokens(last_begins) < tokens <= phases.tokens(found.end_sample)

    found, phases = drawn_plan(drawn, epochs=epochs / 100)  # 100 blocks a pass in every phase

    assert found.end_sample == epochs, "to the sample"
    assert found.end_sample - steps_of(found)[-1][1] < epochs


@given(drawn=runs)
def test_where_phases_end_depends_neither_on_ranks_nor_on_the_warm_up(drawn: dict[str, Any]):
    _, phases = drawn_plan(drawn)
    _, others = drawn_plan({**drawn, "growth": drawn["growth"], "tokens": drawn["tokens"] + 777})
    assert phases == others
    for phase, (seq_len, *_) in zip(phases, drawn["phases"], strict=False):
        until = phases.tokens(phase.end_sample or 0)
        assert (phase.seq_len, (phase.end_sample or 0) - phase.first_sample) == (
            seq_len,
            math.ceil(max(0, until - phases.tokens(phase.first_sample)) / (phase.seq_len * phase.global_size))
            * phase.global_size,
        )


@given(drawn=runs, token=st.integers(0, 60_000))
def test_a_token_has_one_sample(drawn: dict[str, Any], token: int):
    _, phases = drawn_plan(drawn)
    sample = phases.sample_at(token)
    assert phases.tokens(sample) >= token
    assert sample == 0 or phases.tokens(sample - 1) < token


@pytest.mark.parametrize(
    ("batch", "phases", "ranks", "where", "remedy"),
    [
        (
            {"global_size": 24, "micro_size": 4, "warmup": {"start_size": 6, "tokens": 100}},
            None,
            1,
            "batch.warmup.start_size=6, batch.micro_size=4, ranks=1",
            "Set batch.warmup.start_size and increment to multiples of 4, or a smaller batch.micro_size.",
        ),
        (
            {"global_size": 16, "micro_size": 2, "warmup": {"start_size": 4, "tokens": 9000}},
            [{"seq_len": 16, "until_tokens": 9000, "micro_size": 4}],
            2,
            "batch.warmup.start_size=4, data.phases[0].micro_size=4, ranks=2",
            "Set batch.warmup.start_size and increment to multiples of 8, or a smaller data.phases[0].micro_size.",
        ),
        (
            {"global_size": 24},
            [{"seq_len": 16, "until_tokens": 99, "micro_size": 5}],
            2,
            "data.phases[0].global_size=24, data.phases[0].micro_size=5, ranks=2",
            "Set data.phases[0].global_size to 20 or 30, or data.phases[0].micro_size to one of [1, 2, 3, 4, 6, 12].",
        ),
    ],
)
def test_what_does_not_divide_is_refused(
    batch: dict[str, Any], phases: list[dict[str, int]] | None, ranks: int, where: str, remedy: str
):
    with pytest.raises(UserError, match="does not divide into micro-batches") as caught:
        plan(batch, phases, ranks)
    assert (caught.value.where, caught.value.remedy) == (where, remedy)


def test_the_rest_of_a_phase_after_another_batch_size_is_used_and_filled_up_where_it_does_not_divide():
    """A start with batches of 8 stopped at sample 40; the phase of 240 samples goes on with batches of 24."""
    found = plan({"global_size": 24, "micro_size": 4}, SHORT_FIRST, world_size=2)
    assert [size for _, size, _ in steps_of(found, 40, 10)] == [24] * 8 + [8, 24]
    assert [size for _, size, _ in steps_of(found, 36, 10)] == [24] * 8 + [12, 24]
    rest = found.shape_at(36 + 8 * 24)
    assert (rest.global_size, rest.micro_size, rest.accumulation, rest.rank_size) == (12, 4, 2, 8)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"batch": {"global_size": 8, "warmup": {"start_size": 8, "tokens": 9}}}, "start_size must be below"),
        ({"batch": {"global_size": 20, "warmup": {"start_size": 8, "tokens": 9}}}, "does not lead from start_size 8"),
        ({"data": {"train": "x", "seq_len": 32, "phases": [{"seq_len": 64, "until_tokens": 9}]}}, "longer blocks"),
        (
            {
                "data": {
                    "train": "x",
                    "phases": [{"seq_len": 64, "until_tokens": 9}, {"seq_len": 64, "until_tokens": 9}],
                }
            },
            "phases must ascend",
        ),
    ],
)
def test_configs_that_make_no_sense(sections: dict[str, Any], words: str):
    kinds = {"batch": BatchConfig, "data": DataConfig}
    for name, section in sections.items():
        with pytest.raises(ValueError, match=words):
            kinds[name].model_validate(section)
