"""What may change about the data of a run that goes on: what lies ahead, and nothing of the past."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from trainer.data.order.compare import order_differences, shard_differences
from trainer.data.order.run_order import RunOrder
from trainer.data.order.sample_order import SampleOrder
from trainer.schedule.phases import Phase, Phases

SHARDS = [["s0", "a"], ["s1", "b"], ["s2", "c"]]


def described(
    weights: list[float], changes: list[tuple[int, list[float]]] | None = None, names: str = "xyz", **other: Any
) -> dict[str, Any]:
    """The data order of a run over one source for each weight, with mixture blocks of 10 samples."""
    order = SampleOrder([100] * len(weights), weights, 1, 4, 4, 10, changes or [])
    sources = [{"name": name, "fingerprint": name, "quarantine": []} for name in names[: len(weights)]]
    one_phase = RunOrder(Phases((Phase(32, 8, 8, 0, None),)), [order], 1)
    return {**one_phase.describe(), "sources": sources, **other}


def test_nothing_has_changed():
    assert order_differences(described([1, 1]), described([2, 2]), 1000) == []


@pytest.mark.parametrize(
    ("samples", "start", "allowed"), [(40, 40, True), (35, 40, True), (35, 44, True), (45, 44, False), (42, 44, False)]
)
def test_other_weights_may_follow_but_not_touch_a_mixture_block_that_has_begun(samples: int, start: int, allowed: bool):
    before, after = described([1, 1]), described([1, 1], [(start, [0, 1])])
    differences = order_differences(before, after, samples)
    assert (differences == []) == allowed
    one, other = (SampleOrder([100, 100], [1, 1], 1, 4, 4, 10, c) for c in ([], [(start, [0.0, 1.0])]))
    same = all((a[:samples] == b[:samples]).all() for a, b in zip(located(one), located(other), strict=True))
    assert same == allowed, "the rule is what the order does"
    if not allowed:
        assert "can begin at token 1,600 at the earliest (data.stages, data.phases)" in differences[0]  # 50 × 32


def located(order: SampleOrder) -> tuple[Any, Any]:
    return order.locate(np.arange(60))


def test_a_source_may_join_later_and_one_not_yet_visited_may_change():
    assert order_differences(described([1]), described([1, 0], [(50, [1, 1])]), 50) == []
    before = described([1, 0], [(50, [1, 1])])
    assert order_differences(before, described([1, 0], [(50, [1, 1])], names="xq"), 50) == []
    differences = order_differences(before, described([1, 0], [(50, [1, 1])], names="xq"), 51)
    assert differences == ["source 'y' is another (its content differs)"]


def test_sources_that_changed_places_or_went():
    assert order_differences(described([1, 1]), described([1, 1], names="yx"), 9) == [
        "source 'x' was number 1 of data.train, now number 2",
        "source 'y' was number 2 of data.train, now number 1",
    ]
    assert "source 'y' is gone" in order_differences(described([1, 1]), described([1]), 9)


def test_other_numbers():
    differences = order_differences(described([1]), described([1], version=2, chunk_blocks=8), 9)
    assert differences == ["the order's version was 1, now 2", "the order's chunk_blocks was 4, now 8"]


def test_a_quarantine_is_a_change():
    before, after = described([1]), described([1])
    after["sources"][0] |= {"fingerprint": "other", "quarantine": ["s1:3"]}
    expected = ["source 'x' is another (quarantine was empty, now ['s1:3'])"]
    assert order_differences(before, after, 9) == expected
    for order in (before, after):
        order["sources"][0]["shards"] = SHARDS
    assert order_differences(before, after, 9) == expected


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (SHARDS, []),
        ([["s0", "a"], ["s1", "x"], ["s2", "c"]], ["changed: s1"]),
        ([["s0", "a"], ["s2", "c"]], ["gone: s1"]),
        ([*SHARDS, ["s3", "d"]], ["added: s3"]),
        ([["s0", "a"], ["t1", "b"], ["s2", "c"]], ["renamed: s1 to t1"]),
        ([["s1", "b"], ["s0", "a"], ["s2", "c"]], ["its shards are in another order"]),
        ([["s0", "b"], ["s1", "a"], ["s2", "c"]], ["changed: s0, s1"]),
        ([["s0", "x"], ["s9", "y"]], ["changed: s0", "gone: s1, s2", "added: s9"]),
    ],
)
def test_shards(after: list[list[str]], expected: list[str]):
    assert shard_differences(SHARDS, after) == expected
    if expected:
        before = described([1])
        before["sources"][0]["shards"] = SHARDS
        now = described([1], names="q")
        now["sources"][0]["shards"] = after
        assert order_differences(before, now, 9) == [f"source 'x' is another ({'; '.join(expected)})"]


def test_many_shards_are_counted():
    after = [[name, "other"] for name in map(str, range(9))]
    assert shard_differences([[name, "one"] for name in map(str, range(9))], after) == [
        "changed: 0, 1, 2, 3, 4 and 4 more"
    ]
