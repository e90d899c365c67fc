"""metrics.jsonl over crashes and restarts: each step once, whole lines only."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from trainer.tracking.jsonl import JsonlWriter, read_metrics
from trainer.tracking.metrics import as_json


def write_steps(path: Path, resumed_step: int | None, *steps: int) -> None:
    writer = JsonlWriter(path, resumed_step)
    for step in steps:
        writer.write({"step": step, "train/loss": step / 10})
    writer.close()


def steps_in(path: Path) -> list[int]:
    return [line["step"] for line in read_metrics(path)]


def test_a_resume_drops_the_steps_that_happen_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, None, 1, 2, 3, 4, 5)
    write_steps(path, 3, 4, 5, 6)
    assert steps_in(path) == [1, 2, 3, 4, 5, 6]
    write_steps(path, 6)
    assert steps_in(path) == [1, 2, 3, 4, 5, 6]


def test_a_rollback_keeps_the_events_of_the_steps_it_takes_back_at_the_step_it_goes_back_to(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, None, 1, 2, 3, 4)
    writer = JsonlWriter(path, 4)
    writer.write({"step": 4, "event": "skip", "event/from_step": 4})
    writer.close()
    JsonlWriter(path, 2, keep_events=True).close()
    assert [(line["step"], line.get("event/from_step")) for line in read_metrics(path)] == [
        (1, None),
        (2, None),
        (2, 4),
    ]
    write_steps(path, 1)  # a resume from before it: it happens again
    assert steps_in(path) == [1]


def test_a_fresh_start_keeps_none(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, None, 1, 2)
    write_steps(path, None, 1)
    assert steps_in(path) == [1]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("rest", ['{"step": 3, "train/lo', '{"step"', "\x00\x00\x00", '{"step": 1' + "0" * 400 + "}"])
def test_a_line_cut_off_by_a_crash_is_left_out_and_then_written_over(rest: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, None, 1, 2)
    path.write_text(path.read_text() + rest)
    assert steps_in(path) == [1, 2]
    write_steps(path, 2, 3)
    assert steps_in(path) == [1, 2, 3]
    assert path.read_text().count("\n") == 3


def test_a_line_is_there_as_soon_as_it_is_written(tmp_path: Path) -> None:
    writer = JsonlWriter(tmp_path / "metrics.jsonl", None)
    writer.write({"step": 1})
    assert steps_in(tmp_path / "metrics.jsonl") == [1]
    writer.close()


def test_no_file_has_no_lines(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_what_is_not_finite_is_null_and_never_nan_in_the_file(tmp_path: Path) -> None:
    values = as_json({"step": 1, "a": math.nan, "b": math.inf, "c": 0.5, "d": -math.inf})
    assert values == {"step": 1, "a": None, "b": None, "c": 0.5, "d": None}
    writer = JsonlWriter(tmp_path / "metrics.jsonl", None)
    writer.write(values)
    with pytest.raises(ValueError, match="JSON compliant"):
        writer.write({"step": 2, "a": math.nan})
    writer.close()
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [values]
