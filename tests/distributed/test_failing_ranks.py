"""Under `maskwright train`: a rank fails, or its port is wanted by others; the cause is shown and nothing is left."""

from __future__ import annotations

import socket
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from tests.commands import assert_one_card, maskwright, start_maskwright
from tests.fault_points import Fault, Point, at_save, fail, injecting_environment, kill
from tests.faults import processes_with, whole_checkpoints
from tests.faults import train_with as train_ranks_with
from tests.forked import MARK
from tests.ranks import tiny_config, write_config
from tests.waiting import TIMEOUT_S
from trainer.errors import EXIT_FINISHED, EXIT_UNEXPECTED, EXIT_USER_MISTAKE

SECTIONS: dict[str, Any] = {
    "train": {"steps": 10},
    "checkpoint": {"every_steps": 4},
    "data": {"workers": 1},
    "logging": {"tensorboard": True},
}


def train_with(fault: Fault, workspace: Path, folder: Path) -> tuple[int, str]:
    """Exit code and output of `maskwright train` on two ranks, which leaves no process behind (I3)."""
    sources = [{"path": str(workspace / "data" / name), "name": name} for name in ("train", "validation")]
    sections = {**SECTIONS, "data": {**SECTIONS["data"], "train": sources}}
    config = write_config(tiny_config(workspace, folder / "run", **sections), folder / "config.yaml")
    mark = {MARK: uuid.uuid4().hex}
    environment = injecting_environment(folder, [fault])
    process = start_maskwright("train", config, "--nproc-per-node", "2", **environment, **mark)
    output = process.communicate(timeout=TIMEOUT_S)[0]
    ended = {path.name for path in folder.glob("ended-*")}
    killed = {fault.rank} if fault.action is kill else set()
    assert ended == {f"ended-{rank}" for rank in {0, 1} - killed}, "the launcher did not have to end one"
    assert not processes_with(mark[MARK]), output
    return process.returncode, output


SHARD: Point = (("read", r"\.tok$"),)
SECOND_SOURCE: Point = (("read", r"/validation/.*\.tok$"),)  # a worker has the first open from the rank that forked it
FAILURES: dict[str, Fault] = {
    "one rank": Fault(1, SHARD, fail),  # before the first save, when it takes the probe
    "a loader worker": Fault(1, SECOND_SOURCE, fail, in_worker=True),
}


@pytest.mark.parametrize("place", FAILURES)
def test_an_exception_anywhere_ends_all_ranks_and_is_shown(place: str, workspace: Path, tmp_path: Path) -> None:
    fault = FAILURES[place]
    code, output = train_with(fault, workspace, tmp_path)
    assert code == EXIT_UNEXPECTED
    assert "InjectedError: the injected cause" in output
    assert f"where:  rank {fault.rank}; its log: {tmp_path}/run/logs/rank-0000{fault.rank}.log" in output
    assert "Connection closed" not in output, "what the other rank meets is no cause"
    assert whole_checkpoints(tmp_path / "run") == []


@pytest.mark.parametrize("file", [r"/metrics\.jsonl$", r"/events\.out\.tfevents"])
def test_an_exception_in_the_logger_ends_all_ranks(file: str, workspace: Path, tmp_path: Path) -> None:
    fault = Fault(0, (("write", file),), fail)
    outcome = train_ranks_with(tiny_config(workspace, tmp_path, **SECTIONS), fault)
    assert 0 not in outcome.codes
    assert "InjectedError: the injected cause" in outcome.output


def test_the_death_of_the_master_is_named_and_ends_all(workspace: Path, tmp_path: Path) -> None:
    code, output = train_with(Fault(0, at_save("before the manifest", 8), kill), workspace, tmp_path)
    assert code == EXIT_UNEXPECTED
    assert "rank 0 was killed by SIGKILL" in output
    assert "Traceback" not in output
    assert whole_checkpoints(tmp_path / "run") == [4]


def port_of(launcher: int) -> int:
    """MASTER_PORT of the ranks of a launcher, as soon as one has it."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
            variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            for variable in variables:
                if variable.startswith(b"MASTER_PORT="):
                    return int(variable.partition(b"=")[2])
        time.sleep(0.01)
    raise AssertionError("no rank was started")


def test_nobody_can_take_the_port_while_the_ranks_start(workspace: Path, tmp_path: Path) -> None:
    config = write_config(tiny_config(workspace, tmp_path / "run", train={"steps": 2}), tmp_path / "config.yaml")
    process = start_maskwright("train", config, "--nproc-per-node", "2", fresh=True)
    port = port_of(process.pid)
    attempts = 0
    with socket.socket() as other:
        while not (tmp_path / "run" / "metrics.jsonl").exists() and process.poll() is None:
            with pytest.raises(OSError, match="Address already in use"):
                other.bind(("127.0.0.1", port))
            attempts += 1
            time.sleep(0.05)
    assert process.communicate(timeout=TIMEOUT_S)[0].count("finished") == 1
    assert process.returncode == EXIT_FINISHED
    assert attempts > 5


def test_a_given_port_that_is_taken_is_an_error_with_a_remedy(workspace: Path, tmp_path: Path) -> None:
    config = write_config(tiny_config(workspace, tmp_path / "run"), tmp_path / "config.yaml")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        result = maskwright("train", config, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **place)
    words = (
        f"Port {port} of 127.0.0.1",
        "taken by another process",
        f"MASTER_PORT={port}",
        "Export another MASTER_PORT",
    )
    assert_one_card(result, EXIT_USER_MISTAKE, *words)
    assert not (tmp_path / "run").exists()
