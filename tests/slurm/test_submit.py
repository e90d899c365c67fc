"""`maskwright submit` on a real SLURM of two nodes: jobs that are signalled, lose a node, or get nowhere."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForMaskedLM

from tests.commands import assert_one_card
from tests.gate import Gate
from tests.ranks import losses, tiny_config, train, write_config
from tests.slurm.cluster import SlurmCluster
from tests.slurm.runs import (
    ONE_NODE,
    job_logs,
    run_of_60_steps,
    run_submit,
    signal_job,
    submit,
    wait_for_training,
    write_site,
)
from trainer.errors import EXIT_FINISHED, EXIT_UNEXPECTED, EXIT_USER_MISTAKE
from trainer.tracking.starts import read_start_records
from trainer.tracking.status import read_status

ROOT = Path(__file__).parents[2]


def state_of(run_dir: Path) -> str:
    status = read_status(run_dir)
    return status.state if status is not None else ""


def test_a_job_that_is_signalled_and_loses_a_node_ends_by_itself_as_if_nothing_had_happened(
    cluster: SlurmCluster, workspace: Path, tmp_path: Path
) -> None:
    config, site = run_of_60_steps(workspace, tmp_path / "a run"), write_site(tmp_path / "site.yaml")
    run_dir = Path(config.run.dir)
    gate = Gate(tmp_path)
    gate.close_after(22)
    job = submit(cluster, write_config(config, tmp_path / "config.yaml"), "--convert", site=site, **gate.environment)
    wait_for_training(cluster, run_dir, 22)
    signal_job(cluster, job, "TERM")
    cluster.wait_for(lambda: state_of(run_dir) == "stopped", "the end after TERM")
    gate.close_after(36)
    wait_for_training(cluster, run_dir, 36)
    cluster.kill_node("n2")
    gate.open()
    cluster.wait_for(lambda: cluster.states(job)[0].restarts == 2, f"a requeue\n{job_logs(run_dir)}")
    cluster.notice("n2")
    cluster.revive_node("n2")
    (end,) = cluster.wait(job)
    assert (end.state, end.exit_code, end.restarts) == ("COMPLETED", 0, 2), job_logs(run_dir)
    (conversion,) = cluster.wait(job + 1)
    assert conversion.state == "COMPLETED", job_logs(run_dir)

    clean = run_of_60_steps(workspace, tmp_path / "clean")
    assert train(clean, world_size=2) == EXIT_FINISHED
    assert losses(run_dir) == pytest.approx(losses(tmp_path / "clean"), abs=1e-5)  # each step once
    starts = read_start_records(run_dir)
    assert [(start.job, start.restart, start.nodes, start.world) for start in starts] == [
        (str(job), restart, "n[1-2]", 2) for restart in range(3)
    ]
    steps = [start.step for start in starts]
    assert steps == [0, 22, 35], "where it was asked to stop, and the last whole checkpoint"
    status = read_status(run_dir)
    assert status is not None and (status.state, status.restarts, status.job_id) == ("finished", 2, str(job))
    AutoModelForMaskedLM.from_pretrained(run_dir / "model")
    assert "not every node answers" in (run_dir / f"false-starts-{job}.txt").read_text()


def test_a_job_that_gets_nowhere_stops_and_says_so(cluster: SlurmCluster, workspace: Path, tmp_path: Path) -> None:
    config = tiny_config(
        workspace,
        tmp_path / "run",
        train={"steps": 10_000},
        resilience={"max_idle_starts": 2},
    )
    run_dir = Path(config.run.dir)
    site, gate = write_site(tmp_path / "site.yaml"), Gate(tmp_path)
    gate.close_after(0)
    arguments = (write_config(config, tmp_path / "config.yaml"), "--convert")
    job = submit(cluster, *arguments, site=site, nodes=ONE_NODE, **gate.environment)
    log = run_dir / "logs" / f"slurm-{job}.log"
    for restart in range(2):
        cluster.wait_for(lambda count=restart + 1: len(read_start_records(run_dir)) == count, f"start {restart + 1}")
        signal_job(cluster, job, "USR1")
    (end,) = cluster.wait(job)
    assert (end.state, end.exit_code, end.restarts) == ("FAILED", EXIT_UNEXPECTED, 2), log.read_text()
    assert [start.step for start in read_start_records(run_dir)] == [0, 0]
    reason = f"SLURM job {job} makes no progress: it has started 2 times at step 0, and is there again."
    assert reason in log.read_text()
    status = read_status(run_dir)
    assert status is not None and (status.state, status.reason) == ("failed", reason)
    (conversion,) = cluster.wait(job + 1)
    assert conversion.state == "CANCELLED", "there is nothing to convert"
    assert not os.path.exists(run_dir / "model")


def test_a_bad_node_is_found_before_the_ranks_start_and_excluded(
    cluster: SlurmCluster, workspace: Path, tmp_path: Path
) -> None:
    config, repaired = tiny_config(workspace, tmp_path / "run", train={"steps": 5}), tmp_path / "repaired"
    run_dir = Path(config.run.dir)
    command = tmp_path / "maskwright"  # which cannot write more than some kilobytes on n2
    command.write_text(
        f'#!/bin/sh\n[ "$SLURMD_NODENAME" = n1 ] || [ -e {repaired} ] || ulimit -f 100\n'
        f'exec {sys.executable} -m launcher "$@"\n'
    )
    command.chmod(0o755)
    site = write_site(tmp_path / "site.yaml", command=str(command))
    arguments = (write_config(config, tmp_path / "config.yaml"), "--exclude-bad-nodes")
    job = submit(cluster, *arguments, site=site)
    cluster.wait_for(lambda: cluster.states(job)[0].restarts == 1, "a requeue")
    shown = cluster.run("scontrol", "show", "job", str(job))
    assert "ExcNodeList=n2" in shown, job_logs(run_dir)
    found = json.loads((run_dir / "preflight.json").read_text())
    assert found["bad_nodes"] == ["n2"] and not found["ok"]
    assert "preflight: n2 will be excluded" in (run_dir / f"false-starts-{job}.txt").read_text()
    assert not (run_dir / "starts.jsonl").exists(), "the ranks have not been started"

    repaired.touch()
    cluster.run("scontrol", "update", f"JobId={job}", "ExcNodeList=")
    (end,) = cluster.wait(job)
    assert (end.state, end.exit_code, end.restarts) == ("COMPLETED", EXIT_FINISHED, 1), job_logs(run_dir)
    assert len(losses(run_dir)) == 5


def test_what_slurm_refuses_is_shown_and_nothing_is_queued(
    cluster: SlurmCluster, workspace: Path, tmp_path: Path
) -> None:
    config = write_config(tiny_config(workspace, tmp_path / "run"), tmp_path / "config.yaml")
    arguments = (config, "--nodes", "2", "--gpus-per-node", "1")  # these nodes have none
    refused = run_submit(cluster, *arguments, site=write_site(tmp_path / "site.yaml"))
    assert_one_card(refused, EXIT_USER_MISTAKE, "SLURM refuses the job: ", "train.sbatch", "--dry-run shows the script")
    assert cluster.run("squeue", "--noheader") == ""


def test_the_script_is_used_by_hand_with_exported_variables(
    cluster: SlurmCluster, workspace: Path, tmp_path: Path
) -> None:
    config = write_config(tiny_config(workspace, tmp_path / "run"), tmp_path / "config.yaml")
    variables = {
        "CONFIG": str(config),
        "RUN": str(tmp_path / "run"),
        "MASKWRIGHT": f"{sys.executable} -m launcher",
        "SRUN_OPTIONS": "--wait=30",
        "MASTER_ADDR": "127.0.0.1",
    }
    options = ("--nodes=2", "--cpus-per-task=1", f"--chdir={ROOT}", f"--output={tmp_path}/job.log")
    job = cluster.submit(*options, ROOT / "slurm" / "train.sbatch", "train.steps=5", cwd=tmp_path, **variables)
    (end,) = cluster.wait(job)
    assert (end.state, end.exit_code) == ("COMPLETED", EXIT_FINISHED), (tmp_path / "job.log").read_text()
    assert len(losses(tmp_path / "run")) == 5
    assert read_start_records(tmp_path / "run")[0].world == 2
