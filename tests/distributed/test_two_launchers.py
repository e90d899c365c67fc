"""Several nodes without SLURM: a launcher on each, here two on one machine; and torchrun, through the same entry."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

import pytest

from launcher.console import EXIT_INTERRUPTED
from tests.commands import assert_one_card, maskwright, start_maskwright
from tests.faults import processes_with, whole_checkpoints
from tests.forked import MARK
from tests.ranks import free_port, losses, tiny_config, write_config
from tests.waiting import TIMEOUT_S, Started, rank_processes, wait_for_step
from trainer.errors import EXIT_FINISHED, EXIT_STOPPED_AFTER_SAVING, EXIT_UNEXPECTED, EXIT_USER_MISTAKE
from trainer.tracking.status import AT_ONCE, read_status


def start_nodes(config: Path, *overrides: str, **variables: str) -> list[Started]:
    """A launcher for each of two nodes, with a rank each; the second one comes first."""
    port = str(free_port())
    nodes = ("--nproc-per-node", "1", "--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", port)
    launchers = [
        start_maskwright("train", config, *overrides, *nodes, "--node-rank", str(node), **variables) for node in (1, 0)
    ]
    return launchers[::-1]


def outputs(launchers: Sequence[Started]) -> list[str]:
    return [launcher.communicate(timeout=TIMEOUT_S)[0] for launcher in launchers]


def test_two_launchers_train_one_run_and_ctrl_c_at_either_stops_both(workspace: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    config = write_config(tiny_config(workspace, run_dir, train={"steps": 100_000}), tmp_path / "config.yaml")
    launchers = start_nodes(config)
    wait_for_step(launchers[0], run_dir, 3)
    launchers[1].send_signal(signal.SIGINT)
    first, second = outputs(launchers)
    assert [launcher.returncode for launcher in launchers] == [EXIT_STOPPED_AFTER_SAVING] * 2, first + second
    assert "node 0 of 2: ranks 0 to 0; they meet at 127.0.0.1:" in first
    assert "node 1 of 2: ranks 1 to 1; the console is that of node 0" in second
    (step,) = whole_checkpoints(run_dir)
    assert f"stopped at step {step} on a signal to another rank" in first
    status = read_status(run_dir)
    assert status is not None and (status.state, status.world_size, status.step) == ("stopped", 2, step)
    assert len(losses(run_dir)) == step

    mark = uuid.uuid4().hex
    launchers = start_nodes(config, **{MARK: mark})
    wait_for_step(launchers[0], run_dir, step + 3)
    assert all(len(rank_processes(launcher)) == 1 for launcher in launchers)
    # A stopped rank cannot save: the first Ctrl-C waits, the second ends its node at once, and the other one with it.
    (deaf,) = rank_processes(launchers[0])
    os.kill(deaf, signal.SIGSTOP)
    launchers[0].send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        launchers[0].wait(2)
    launchers[0].send_signal(signal.SIGINT)
    first, second = outputs(launchers)
    assert [launcher.returncode for launcher in launchers] == [EXIT_INTERRUPTED, EXIT_UNEXPECTED], first + second
    assert "the cause is with the launcher of that one's node" in second
    assert not processes_with(mark)
    status = read_status(run_dir)
    assert status is not None and (status.state, status.reason, status.restarts) == ("stopped", AT_ONCE, 1)
    assert whole_checkpoints(run_dir) == [step]


def test_a_taken_port_of_node_0_is_a_card(workspace: Path, tmp_path: Path) -> None:
    config = write_config(tiny_config(workspace, tmp_path / "run"), tmp_path / "config.yaml")
    with socket.create_server(("", 0)) as other:
        port = str(other.getsockname()[1])
        nodes = ("--nnodes", "2", "--node-rank", "0", "--master-addr", "localhost", "--master-port", port)
        result = maskwright("train", config, *nodes)
    assert_one_card(result, EXIT_USER_MISTAKE, f"Port {port} of this machine", f"--master-port {port}")
    assert not (tmp_path / "run").exists()


def test_torchrun_comes_in_by_the_same_entry(workspace: Path, tmp_path: Path) -> None:
    config = write_config(tiny_config(workspace, tmp_path / "run", train={"steps": 3}), tmp_path / "config.yaml")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=2"]
    place = [f"--master-port={free_port()}", "-m", "launcher", "train", str(config)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([*torchrun, *place], capture_output=True, text=True, timeout=TIMEOUT_S, env=environ)
    assert result.returncode == EXIT_FINISHED, result.stdout + result.stderr
    assert result.stdout.count("finished: 3 steps") == 1
    status = read_status(tmp_path / "run")
    assert status is not None and (status.state, status.world_size) == ("finished", 2)
