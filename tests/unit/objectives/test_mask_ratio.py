from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from tests.unit.objectives.test_masking import masking, numbers, some_blocks
from trainer.config import ObjectiveConfig
from trainer.data.blocks import IGNORED_LABEL
from trainer.errors import UserError
from trainer.schedule.mask_ratio import ratio_differences, ratio_stages

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
    phases = [(0, 128), (10, 512)]  # the second begins at token 1,280
    settings = objective((0, 0.3), (129, 0.2), (1280, 0.15), (1793, 0.1))
    assert ratio_stages(settings, phases) == ((0, 0.3), (2, 0.2), (10, 0.15), (12, 0.1))
    with pytest.raises(UserError, match="from token 129 and from token 256 would begin with the same block") as caught:
        ratio_stages(objective((0, 0.3), (129, 0.2), (256, 0.1)), phases)
    assert caught.value.where == "objective.mask_ratio[2].from_tokens=256"


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
