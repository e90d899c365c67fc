from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from tests.unit.objectives.test_masking import masking, numbers, some_blocks
from trainer.config import BatchConfig, DataConfig, ObjectiveConfig
from trainer.data.blocks import IGNORED_LABEL
from trainer.errors import UserError
from trainer.schedule.mask_ratio import ratio_differences, ratio_stages, recorded_ratio, stages_within
from trainer.schedule.phases import Phases, lay_out

SEQ_LEN, FIRST, SECOND = 102, 100, 200
LATER = ((FIRST, 0.3), (SECOND, 0.05))
BY_SAMPLE = {FIRST - 1: 15, FIRST: 30, SECOND - 1: 30, SECOND: 5, 10**9: 5}


def predicted(index: np.ndarray, labels: np.ndarray, rows: int) -> list[set[int]]:
    """Positions that each block predicts."""
    places, kept = index.reshape(rows, -1) % SEQ_LEN, labels.reshape(rows, -1) != IGNORED_LABEL
    return [set(place[keep].tolist()) for place, keep in zip(places, kept, strict=True)]


def test_each_sample_has_the_share_of_its_stage_whoever_stands_beside_it():
    samples = np.array(list(BY_SAMPLE), np.uint64)
    tokens = some_blocks(len(samples), SEQ_LEN)
    staged = masking(mask_ratio=0.15, later=LATER)
    input_ids, index, labels = staged.apply(tokens, samples, seed=3)
    found = predicted(index, labels, len(samples))
    assert [len(places) for places in found] == list(BY_SAMPLE.values())
    assert len(index) == 30 * len(samples), "one shape for all blocks of a batch"
    for row, sample in enumerate(samples):
        one = (tokens[row : row + 1], samples[row : row + 1], 3)
        alone = staged.apply(*one)
        assert np.array_equal(alone[0][0], input_ids[row])
        assert predicted(*alone[1:], 1) == [found[row]]
        constant = masking(mask_ratio=BY_SAMPLE[int(sample)] / 100).apply(*one)
        assert all(np.array_equal(ours, theirs) for ours, theirs in zip(alone, constant, strict=True))


def test_what_a_smaller_share_predicts_a_larger_one_does_too():
    tokens, samples = some_blocks(8, SEQ_LEN), numbers(8)
    few, many = (predicted(*masking(mask_ratio=ratio).apply(tokens, samples, 0)[1:], 8) for ratio in (0.1, 0.4))
    assert all(small < large for small, large in zip(few, many, strict=True))


def objective(*stages: tuple[int, float]) -> ObjectiveConfig:
    return ObjectiveConfig.model_validate({"mask_ratio": as_listed(*stages)})


def as_listed(*stages: tuple[int, float]) -> list[dict[str, Any]]:
    return [{"from_tokens": token, "ratio": ratio} for token, ratio in stages]


def test_a_stage_begins_with_the_first_block_at_its_token():
    data, phases = laid_out({"seq_len": 128, "until_tokens": 1280})
    settings = objective((0, 0.3), (129, 0.2), (1280, 0.15), (1793, 0.1))
    assert ratio_stages(settings, data, phases) == ((0, 0.3), (2, 0.2), (10, 0.15), (12, 0.1))
    with pytest.raises(UserError, match="from token 129 and from token 256 would begin with the same block") as caught:
        ratio_stages(objective((0, 0.3), (129, 0.2), (256, 0.1)), data, phases)
    assert caught.value.where == "objective.mask_ratio[2].from_tokens=256"


def laid_out(*phases: dict[str, Any]) -> tuple[DataConfig, Phases]:
    """Blocks of 512 at the end, one sequence a step."""
    data = DataConfig.model_validate({"train": "x", "seq_len": 512, "phases": phases})
    return data, lay_out(data, BatchConfig(global_size=1, micro_size=1))


THREE = ({"seq_len": 128, "until_tokens": 1280, "mask_ratio": 0.3}, {"seq_len": 512, "until_tokens": 1792})


def test_phases_have_shares_of_their_own_and_are_recorded_as_stages():
    """The second phase, of one block, leaves it out: it is the last one's."""
    data, phases = laid_out(*THREE)
    stages, settings = ((0, 0.3), (10, 0.05)), ObjectiveConfig(mask_ratio=0.05)
    assert ratio_stages(settings, data, phases) == stages
    assert recorded_ratio(settings, data, phases) == as_listed((0, 0.3), (1280, 0.05))
    assert [stages_within(stages, phases, number) for number in range(3)] == [((0, 0.3),), ((10, 0.05),), ((10, 0.05),)]
    assert recorded_ratio(settings, *laid_out()) == 0.05, "as ever, without phases"
    moved = recorded_ratio(settings, *laid_out({**THREE[0], "mask_ratio": 0.25}))
    recorded = recorded_ratio(settings, data, phases)
    (line,) = ratio_differences(recorded, moved, phases.lengths, samples=3)
    assert "was 0.3, now 0.25" in line
    longer = recorded_ratio(settings, *laid_out({**THREE[0], "until_tokens": 2560}))
    assert ratio_differences(recorded, longer, phases.lengths, samples=10) == [], "what lies ahead may change"
    assert ratio_differences(recorded, longer, phases.lengths, samples=11)


def test_stages_within_a_phase_are_those_that_its_samples_lie_in():
    data, phases = laid_out({"seq_len": 128, "until_tokens": 1280})
    stages = ratio_stages(objective((0, 0.3), (129, 0.2), (1280, 0.15), (1793, 0.1)), data, phases)
    assert stages_within(stages, phases, 0) == ((0, 0.3), (2, 0.2))
    assert stages_within(stages, phases, 1) == ((10, 0.15), (12, 0.1))


def test_only_what_has_been_seen_may_not_change():
    phases, before = [(0, 100)], as_listed((0, 0.3), (950, 0.2), (2000, 0.1))
    same: list[Any] = [
        before,
        as_listed((0, 0.3), (901, 0.2)),  # from sample 10 on as well
        as_listed((0, 0.3), (950, 0.2), (1500, 0.5)),
        as_listed((0, 0.3), (500, 0.3), (950, 0.2)),  # a change that is none
    ]
    assert [ratio_differences(before, now, phases, samples=15) for now in same] == [[]] * len(same)
    for other in (0.3, as_listed((0, 0.3), (850, 0.2)), as_listed((0, 0.3), (950, 0.2), (1499, 0.1)), 0.2):
        (line,) = ratio_differences(before, other, phases, samples=16)
        assert "was 0.3, from sample 10 on 0.2, now" in line and "token 1,600 at the earliest" in line
    assert ratio_differences(0.3, before, phases, samples=10) == [], "a run without stages takes some up"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([], "at least 1 item"),
        (as_listed((5, 0.2)), "must begin with a stage from_tokens 0, got 5"),
        (as_listed((0, 0.2), (0, 0.3)), "must ascend"),
        (as_listed((0, 1.0)), "less than 1"),
        (1.5, "less than 1"),
    ],
)
def test_shares_that_cannot_be(value: Any, words: str):
    with pytest.raises(ValidationError, match=words):
        ObjectiveConfig(mask_ratio=value)
