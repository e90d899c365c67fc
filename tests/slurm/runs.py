"""Runs on the test cluster, submitted as a user does."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

from tests.commands import maskwright
from tests.ranks import metrics, tiny_config
from tests.slurm.cluster import SlurmCluster
from trainer.config import Config

TWO_NODES = ("--nodes", "2", "--tasks-per-node", "1", "--cpus-per-task", "1")
ONE_NODE = ("--nodes", "1", *TWO_NODES[2:])


def run_of_60_steps(workspace: Path, run_dir: Path, **sections: Any) -> Config:
    """60 steps, which tests hold at a gate, with many checkpoints."""
    slow = {
        "train": {"steps": 60},
        "batch": {"global_size": 16, "micro_size": 4},
        "checkpoint": {"every_steps": 5},
    }
    return tiny_config(workspace, run_dir, **{**slow, **sections})


def write_site(path: Path, **keys: object) -> Path:
    """A site file for the cluster: its nodes have names that only SLURM knows. JSON is YAML."""
    # srun gives a step whose first rank has ended half a minute instead of a whole one.
    site = {"environment": {"MASTER_ADDR": "127.0.0.1"}, "srun": ["--wait=30"], **keys}
    path.write_text(json.dumps(site))
    return path


def run_submit(
    cluster: SlurmCluster, *arguments: str | Path, site: Path, **variables: str
) -> subprocess.CompletedProcess[str]:
    return maskwright("submit", *arguments, "--site", site, cwd=None, **{**cluster.environ, **variables})


def submit(
    cluster: SlurmCluster, *arguments: str | Path, site: Path, nodes: tuple[str, ...] = TWO_NODES, **variables: str
) -> int:
    """`maskwright submit`; returns the number of the job that trains.

    Args:
        nodes: the options that say how many, and what of each.
        variables: for the environment of the job.
    """
    result = run_submit(cluster, *arguments, *nodes, site=site, **variables)
    assert result.returncode == 0, result.stdout + result.stderr
    return submitted(result.stderr)


def submitted(output: str) -> int:
    """The number of the first job that `submit` says it has submitted."""
    match = re.search(r"^submitted job (\d+): ", output, re.MULTILINE)
    assert match, output
    return int(match[1])


def wait_for_training(cluster: SlurmCluster, run_dir: Path, step: int) -> None:
    """Wait until a step's metrics are written."""

    def reached() -> bool:
        lines = metrics(run_dir)
        return bool(lines) and lines[-1]["step"] >= step

    cluster.wait_for(reached, f"step {step}\n{job_logs(run_dir)}")


def signal_job(cluster: SlurmCluster, job: int, name: str) -> None:
    """Signal the job's script alone, as SLURM does before the time limit."""
    cluster.run("scancel", "--batch", f"--signal={name}", str(job))


def job_logs(run_dir: Path) -> str:
    return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted((run_dir / "logs").glob("slurm-*.log")))
