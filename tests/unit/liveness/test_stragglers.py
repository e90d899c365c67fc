"""Which ranks hold up the others."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.liveness.stragglers import OWN_PHASES, StragglerWatch, find_stragglers


def seconds(ranks: int, **slow: tuple[int, float]) -> np.ndarray:
    """1 s of data and 20 s of forward passes each, but for the ranks that are told, by phase."""
    table = np.tile([1.0, 20.0], (ranks, 1))
    for phase, (rank, value) in slow.items():
        table[rank, OWN_PHASES.index(phase)] = value
    return table


@pytest.mark.parametrize("ranks", [2, 3, 8, 4096])
def test_the_slow_one_is_found_among_any_number(ranks: int) -> None:
    found = find_stragglers(seconds(ranks, forward=(1, 60.0)), wall_seconds=100, ratio=1.5)
    assert [(one.rank, one.phase, one.seconds, one.usual) for one in found] == [(1, "forward", 60.0, 20.0)]


def test_who_loses_most_comes_first() -> None:
    found = find_stragglers(seconds(4, data=(3, 90.0), forward=(1, 60.0)), wall_seconds=100, ratio=1.5)
    assert [(one.rank, one.phase) for one in found] == [(3, "data"), (1, "forward")]


@pytest.mark.parametrize(
    "table",
    [seconds(1), seconds(8), seconds(8, forward=(1, 29.0)), seconds(8, data=(1, 5.9))],
    ids=["alone", "alike", "below the ratio", "many times slower in next to nothing"],
)
def test_nobody_is_named_without_need(table: np.ndarray) -> None:
    assert find_stragglers(table, wall_seconds=100, ratio=1.5) == []


def test_the_line_names_rank_node_phase_and_how_much_slower_once_an_interval() -> None:
    watch = StragglerWatch(every_seconds=60, ratio=1.5, nodes=["n1", "n2"], now=1000.0)
    half = (seconds(2, forward=(1, 60.0)) / 2).tolist()
    assert watch.add(half, now=1050.0) == ""
    line = watch.add(half, now=1100.0)
    assert line == (
        "stragglers of the last 100 s: rank 1 on n2 takes 3.0 times the median in phase forward "
        "(60.0 s against 20.0 s, 40% of the time)"
    )
    assert watch.add(seconds(2).tolist(), now=1101.0) == ""
    assert watch.add(seconds(2).tolist(), now=1300.0) == "", "the account has begun anew"
