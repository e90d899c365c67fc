"""The code keeps within the bounds set for its structure; `python -m tests.house` prints the figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.house import Figures, count


@pytest.fixture(scope="module")
def figures() -> Figures:
    return count()


def test_the_rooms_are_few_and_their_arrows_point_one_way(figures: Figures) -> None:
    assert len(figures.places) <= 20, figures.places
    assert len(figures.arrows) <= 100, figures.arrows
    assert figures.circles == []
    assert figures.train_lines <= 40, "train.py is read from top to bottom"


def test_files_and_functions_are_short(figures: Figures) -> None:
    assert {path: lines for path, lines in figures.files.items() if lines > 400} == {}
    assert {place: lines for place, lines in figures.functions.items() if lines > 60} == {}


@pytest.mark.parametrize("word", ["tests.commands", "run_ranks", "workspace", "run_prepare", "multiprocessing"])
def test_what_is_tested_fast_starts_no_process(word: str) -> None:
    others = [path for path in Path(__file__).parent.rglob("test_*.py") if path != Path(__file__)]
    assert len(others) > 40
    assert [path for path in others if word in path.read_text(encoding="utf-8")] == []
