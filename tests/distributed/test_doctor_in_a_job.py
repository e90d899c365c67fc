"""doctor on the nodes of a job: real processes that find each other, and nodes that do not answer or share nothing."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

from tests.commands import start_maskwright
from tests.ranks import free_port, tiny_config, write_config
from tests.waiting import TIMEOUT_S, Started
from trainer.errors import EXIT_FINISHED, EXIT_USER_MISTAKE


def start_node(run_dir: Path, rank: int, count: int, port: int, answer_s: float = 120) -> Started:
    """doctor as the one process of a node, as torchrun would place it."""
    place = {
        "RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return start_maskwright("doctor", "--job", run_dir, "--answer-seconds", str(answer_s), **place)


def outcome(nodes: list[Started], run_dir: Path) -> tuple[list[int], list[str], dict[str, Any]]:
    outputs = [node.communicate(timeout=TIMEOUT_S)[0] for node in nodes]
    return [node.returncode for node in nodes], outputs, json.loads((run_dir / "preflight.json").read_text())


def test_two_nodes_that_are_well(workspace: Path, tmp_path: Path) -> None:
    write_config(tiny_config(workspace, tmp_path), tmp_path / "config.yaml")
    port = free_port()
    codes, outputs, found = outcome([start_node(tmp_path, rank, 2, port) for rank in range(2)], tmp_path)
    assert codes == [EXIT_FINISHED] * 2, outputs
    assert found["ok"] and found["bad_nodes"] == [] and found["nodes"] == ["node-0", "node-1"]
    for words in (
        "answer: from all 2 nodes",
        "versions: the same on all: ",
        "shared folder: all 2 nodes see each other's files",
        "clock: within",
        "all-reduce, gloo: 2 nodes have the right sum",
        "bandwidth: ",
    ):
        assert words in outputs[0]
    assert any(line["name"] == "data" and "tokens" in line["finding"] for line in found["lines"])
    assert "answer" not in outputs[1], "one table"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "preflight.json"], "nothing is left"


def test_a_taken_port_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        node = start_node(tmp_path, 0, 2, port)
        output = node.communicate(timeout=TIMEOUT_S)[0]
    assert node.returncode == EXIT_USER_MISTAKE
    assert f"Port {port} of 127.0.0.1" in output and "Export another MASTER_PORT" in output
    assert "Traceback" not in output


def test_bad_nodes_are_named_and_nobody_waits_for_ever(tmp_path: Path) -> None:
    """The second node has another folder, the third one never comes."""
    port, folders = free_port(), [tmp_path / "run", tmp_path / "elsewhere"]
    folders[1].mkdir()
    nodes = [start_node(folder, rank, 3, port, answer_s=20) for rank, folder in enumerate(folders)]
    codes, outputs, found = outcome(nodes, tmp_path / "run")
    assert codes == [EXIT_USER_MISTAKE, EXIT_FINISHED], outputs
    assert found["bad_nodes"] == ["node-1", "node-2"] and not found["ok"]
    assert "--exclude=node-1,node-2" in outputs[0]
    assert "shared folder (node-1): it does not see what node-0 wrote" in outputs[0]
    assert "answer (node-2): none in 20 s" in outputs[0]
