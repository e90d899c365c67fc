"""doctor: what it says of a machine, and which nodes of a job it finds bad."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.commands import maskwright
from tests.ranks import tiny_config, write_config
from tools.doctor.judge import NodeFacts, judge
from tools.doctor.lines import DoctorReport, Line, checked
from tools.doctor.machine import check_devices, check_interface, check_space, check_writing, compare_cuda
from tools.doctor.run import check_config
from trainer.errors import EXIT_FINISHED, EXIT_USER_MISTAKE, UserError

NAMES = ["n1", "n2", "n3", "n4"]
GPU = {"name": "H200", "total_bytes": 141 << 30, "free_bytes": 140 << 30}
TRAFFIC = {
    "backend": "gloo",
    "error": "",
    "is_right": True,
    "from_previous_mbit": 9000.0,
    "all_reduce_mbit": 5000.0,
}
GOOD = NodeFacts(
    versions={"python": "3.11.7", "torch": "2.13.0"},
    devices=[GPU] * 8,
    interface={"speed_mbit": 10_000},
    lines=[{"state": "ok", "name": "disk", "finding": "9 TB free", "remedy": "", "node": ""}],
    told_at=1000.0,
    seen=[0, 1, 2, 3],
    traffic=TRAFFIC,
)


def judged(changes: dict[int, dict[str, Any] | None], count: int = 4) -> DoctorReport:
    """The report on `count` good nodes, some of them changed, or without an answer (None)."""
    good = replace(GOOD, seen=list(range(count)))
    facts = {
        rank: replace(good, **(changes.get(rank) or {})) for rank in range(count) if changes.get(rank, {}) is not None
    }
    return judge(NAMES[:count], facts, answer_s=60)


def test_good_nodes_are_well() -> None:
    report = judged({})
    assert report.ok and report.bad_nodes == [] and report.exit_code == EXIT_FINISHED
    assert {line.state for line in report.lines} == {"ok"}
    text = "\n".join(map(str, report.lines))
    for word in ("from all 4 nodes", "python 3.11.7", "8 × H200", "9 TB free", "9,000 Mbit/s between nodes"):
        assert word in text


def failing(**fields: Any) -> list[dict[str, Any]]:
    return [{"state": "fail", "name": "writing", "finding": "no space", "remedy": "Free some.", "node": "", **fields}]


@pytest.mark.parametrize(
    ("changes", "bad", "words"),
    [
        ({2: None}, ["n3"], "answer (n3): none in 60 s"),
        ({2: {"took_part": False}}, ["n3"], "fell silent"),
        ({1: {"versions": {"python": "3.11.7", "torch": "2.12.0"}}}, ["n2"], "torch 2.12.0, on the others 2.13.0"),
        ({1: {"versions": {"python": "3.11.7"}}}, ["n2"], "torch missing, on the others 2.13.0"),
        ({0: {"devices": [GPU] * 7}}, ["n1"], "GPUs 7 × H200 of 151.4 GB, on the others 8 × H200"),
        ({3: {"lines": failing()}}, ["n4"], "writing (n4): no space"),
        ({1: {"seen": [1]}}, ["n2"], "it does not see what n1, n3, n4 wrote"),
        ({0: {"seen": [0]}}, ["n1"], "it does not see what n2, n3, n4 wrote"),
        ({0: {"seen": [0, 2, 3]}, 2: {"seen": [0, 2, 3]}, 3: {"seen": [0, 2, 3]}}, ["n2"], "do not see what it wrote"),
        ({1: {"traffic": {**TRAFFIC, "error": "timed out"}}}, ["n2"], "1 of 4 nodes could not talk: n2: timed out"),
        ({1: {"traffic": {**TRAFFIC, "is_right": False}}}, ["n2"], "it has a wrong sum"),
        (
            {rank: {"traffic": {**TRAFFIC, "from_previous_mbit": 900.0}} for rank in (1, 2)},
            ["n2"],
            "900 Mbit/s to its neighbours, usual is 9,000",
        ),
    ],
)
def test_a_bad_node_is_named(changes: dict[int, dict[str, Any] | None], bad: list[str], words: str) -> None:
    report = judged(changes)
    assert report.bad_nodes == bad
    assert report.exit_code == EXIT_USER_MISTAKE
    found = [str(line) for line in report.lines if line.state == "fail"]
    assert any(words in line for line in found), found
    assert all(line.remedy for line in report.lines if line.state != "ok")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({2: {"told_at": 1007.5}}, "clock (n3): +7.5 s off the others"),
        ({3: {"lines": failing(state="warn")}}, "writing (n4): no space"),
        (
            {rank: {"traffic": {**TRAFFIC, "from_previous_mbit": 900.0}} for rank in range(4)},
            "the interface is one of 10,000 Mbit/s",
        ),
    ],
)
def test_a_warning_names_and_condemns_nobody(changes: dict[int, dict[str, Any] | None], words: str) -> None:
    report = judged(changes)
    assert report.ok and report.bad_nodes == []
    assert any(words in str(line) for line in report.lines if line.state == "warn"), report.lines


def test_of_two_nodes_that_differ_the_first_is_right_and_when_none_can_talk_none_is_condemned() -> None:
    report = judged({1: {"seen": [1], "versions": {**GOOD.versions, "torch": "2.12.0"}}}, count=2)
    assert report.bad_nodes == ["n2"]
    broken = {"traffic": {**TRAFFIC, "error": "refused"}}
    report = judged({0: broken, 1: broken}, count=2)
    assert not report.ok and report.bad_nodes == []


def test_one_node_needs_no_partner() -> None:
    assert judged({}, count=1).ok


def test_what_a_check_raises_is_a_finding() -> None:
    def refuse() -> list[Line]:
        raise UserError("a key is wrong", where="batch", remedy="Mend it.")

    def break_down() -> list[Line]:
        raise OSError("libcudart.so.13: cannot open shared object file")

    assert [str(line) for line in checked("config", refuse)] == ["fail  config: a key is wrong [batch]  → Mend it."]
    (line,) = checked("torch", break_down)
    assert line.state == "fail" and "libcudart" in line.finding and line.remedy


@pytest.mark.parametrize(
    ("of_torch", "nvcc", "state"),
    [
        ("12.8", "Cuda compilation tools, release 12.4, V12.4.131", "ok"),
        ("13.0", "Cuda compilation tools, release 12.4, V12.4.131", "warn"),
        ("13.0", "", "warn"),
    ],
)
def test_nvcc_is_held_against_torchs_cuda(of_torch: str, nvcc: str, state: str) -> None:
    assert compare_cuda(of_torch, nvcc).state == state


def test_a_gpu_that_another_process_uses_and_a_lost_driver_fail() -> None:
    lines = check_devices([GPU, {**GPU, "free_bytes": 20 << 30}])
    assert [line.state for line in lines] == ["ok", "ok", "fail", "ok"]
    assert "make test-gpu" in lines[-1].finding


def test_a_folder_that_cannot_be_written_fails(tmp_path: Path) -> None:
    assert [line.state for line in check_writing(tmp_path / "not" / "there")] == ["ok"]
    assert list(tmp_path.iterdir()) == []
    (line,) = check_writing(Path("/proc"))
    assert line.state == "fail" and line.remedy
    assert {line.name for line in check_space(tmp_path)} >= {"disk", "temporary files"}


@pytest.mark.parametrize(
    ("found", "states"),
    [
        ({"address": "10.0.0.3", "interface": "eth0"}, ["ok"]),
        ({"address": "127.0.1.1", "interface": "lo"}, ["warn"]),
        ({"address": "", "interface": ""}, ["warn"]),
    ],
)
def test_an_address_that_others_cannot_reach_is_a_warning(found: dict[str, Any], states: list[str]) -> None:
    assert [line.state for line in check_interface({**found, "all": {"eth0": 10_000}})] == states


def test_an_interface_that_is_not_there_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib7")
    found = {"address": "10.0.0.3", "interface": "eth0", "all": {"eth0": None}}
    assert [line.state for line in check_interface(found)] == ["fail", "ok"]
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth")
    assert [line.state for line in check_interface(found)] == ["ok", "ok"], "a prefix will do"


def test_what_a_config_names_is_looked_at(workspace: Path, tmp_path: Path) -> None:
    config = tiny_config(workspace, tmp_path / "run")
    lines = checked("config", partial(check_config, config))
    assert {line.state for line in lines} == {"ok"} and "tokens" in lines[0].finding


def test_this_machine_with_a_config_that_names_what_is_not_there(workspace: Path, tmp_path: Path) -> None:
    config = write_config(tiny_config(workspace, tmp_path / "run"), tmp_path / "config.yaml")
    result = maskwright("doctor", config, "model.tokenizer=nowhere", "--json")
    assert result.returncode == EXIT_USER_MISTAKE, result.stdout + result.stderr
    found = json.loads(result.stdout)
    states = {line["name"]: line["state"] for line in found["lines"]}
    well = ("python", "torch", "deepspeed", "cpu", "gpu", "disk", "writing", "all-reduce, gloo")
    assert {states[name] for name in well} == {"ok"}
    (failed,) = [line for line in found["lines"] if line["state"] == "fail"]
    assert failed["name"] == "config" and "nowhere" in failed["finding"] and failed["remedy"]
    assert not found["ok"] and found["bad_nodes"] == []
    assert not (tmp_path / "run").exists(), "looking leaves nothing"


@pytest.mark.parametrize(("error", "state"), [(None, "ok"), (errno.ENOLCK, "warn")])
def test_a_file_system_without_locks_is_said(
    error: int | None, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = []

    def lockf(file: int, *_: int) -> None:
        locked.append(os.readlink(f"/proc/self/fd/{file}"))
        if error is not None:
            raise OSError(error, os.strerror(error))

    monkeypatch.setattr("fcntl.lockf", lockf)
    (line,) = check_writing(tmp_path)
    assert (line.state, "the file system has no locks" in line.finding) == (state, state == "warn")
    assert [Path(path).parent for path in locked] == [tmp_path], "the file that was written is what is locked"
