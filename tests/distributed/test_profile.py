"""`train.profile`: the trace is read back as TensorBoard and Perfetto do, and a resume keeps to what is left."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.test_resume import stop_at_step_7
from tests.ranks import ADDING, losses, run_ranks, tiny_config, train
from trainer.errors import EXIT_FINISHED, EXIT_STOPPED_AFTER_SAVING
from trainer.tracking.profiler import RANGES


def ranges_of(trace: Path) -> tuple[dict[str, list[tuple[float, float]]], list[dict[str, Any]]]:
    """(start, end) of each record_function range by name, in microseconds, and all complete events."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    complete = [event for event in events if event.get("ph") == "X"]
    found: dict[str, list[tuple[float, float]]] = {}
    for event in complete:
        if event.get("cat") == "user_annotation":
            found.setdefault(event["name"], []).append((event["ts"], event["ts"] + event["dur"]))
    return found, complete


def traces(run_dir: Path) -> list[str]:
    return sorted(str(path.relative_to(run_dir / "profile")) for path in run_dir.glob("profile/*/*"))


def test_the_trace_has_the_steps_and_their_parts_and_training_is_the_same(
    workspace: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """4 sequences a rank in micro-batches of 2: each step has two forward and backward passes."""
    profile = {"start": 3, "steps": 2, "all_ranks": True}
    config = tiny_config(workspace, tmp_path / "run", train={"steps": 6, "profile": profile}, **ADDING)
    assert train(config, 2) == EXIT_FINISHED
    assert f"profile of steps 3 to 4: {tmp_path}/run/profile/steps-00000003-00000004" in capfd.readouterr().out
    names = [f"steps-00000003-00000004/rank-0000{rank}.pt.trace.json.gz" for rank in (0, 1)]
    assert traces(tmp_path / "run") == names
    for name in names:
        found, events = ranges_of(tmp_path / "run" / "profile" / name)
        assert Counter({part: len(found[part]) for part in RANGES}) == Counter(
            {"data": 2, "forward": 4, "backward": 4, "optimizer": 4}
        )
        steps = [found[f"ProfilerStep#{step}"][0] for step in (3, 4)]
        assert "ProfilerStep#2" not in found and "ProfilerStep#5" not in found
        for part in RANGES:
            inside = [[begin <= start and end <= stop for start, end in found[part]] for begin, stop in steps]
            assert sum(map(sum, inside)) == len(found[part]), f"{part} lies within the steps"
            assert sum(inside[0]) == sum(inside[1])
        operators = {event["name"] for event in events if event.get("cat") == "cpu_op"}
        assert {"aten::addmm", "aten::embedding"} <= operators
        assert any("all_reduce" in name or "allreduce" in name for name in {event["name"] for event in events})
    plain = tiny_config(workspace, tmp_path / "plain", train={"steps": 6}, **ADDING)
    assert train(plain, 2) == EXIT_FINISHED
    assert losses(tmp_path / "plain") == losses(tmp_path / "run")
    assert not (tmp_path / "plain" / "profile").exists()


def test_a_resume_within_what_is_profiled_goes_on_and_one_after_it_says_so(
    workspace: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sections = {"train": {"steps": 10, "profile": {"start": 6, "steps": 4}}, "checkpoint": {"every_steps": 8}}
    config = tiny_config(workspace, tmp_path / "run", **sections)
    assert run_ranks(stop_at_step_7, 2, config, "auto") == [EXIT_STOPPED_AFTER_SAVING] * 2
    assert traces(tmp_path / "run") == ["steps-00000006-00000008/rank-00000.pt.trace.json.gz"], "step 8 was begun"
    capfd.readouterr()
    assert train(config, 2) == EXIT_FINISHED
    said = capfd.readouterr().out
    assert "profile: steps before 8 were done by an earlier start; steps 8 to 9 will be profiled" in said
    assert traces(tmp_path / "run")[1:] == ["steps-00000008-00000009/rank-00000.pt.trace.json.gz"]
    longer = tiny_config(workspace, tmp_path / "run", **{**sections, "train": {**sections["train"], "steps": 12}})
    assert train(longer, 2) == EXIT_FINISHED
    said = capfd.readouterr().out
    assert "profile: steps before 11 were done by an earlier start; nothing will be profiled" in said
    assert len(traces(tmp_path / "run")) == 2


def test_a_dry_run_writes_no_trace_and_a_start_beyond_the_end_is_said(
    workspace: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(workspace, tmp_path / "run", train={"steps": 6, "profile": {"start": 1}})
    assert train(config, dry_run=True) == EXIT_FINISHED
    assert not (tmp_path / "run").exists()
    late = tiny_config(workspace, tmp_path / "run", train={"steps": 6, "profile": {"start": 7}})
    assert train(late) == EXIT_FINISHED
    assert "profile: the run ends before step 7, so nothing is profiled" in capfd.readouterr().out
    assert traces(tmp_path / "run") == []
