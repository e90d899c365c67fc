"""doctor in a real SLURM job of two nodes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.slurm.cluster import NODES, SlurmCluster

SCRIPT = """#!/bin/bash
export MASTER_ADDR=127.0.0.1
srun --ntasks-per-node=1 {python} -m launcher doctor --job {run}
"""


def test_every_node_looks_at_itself_and_is_called_as_slurm_calls_it(cluster: SlurmCluster, tmp_path: Path) -> None:
    (tmp_path / "job.sh").write_text(SCRIPT.format(python=sys.executable, run=tmp_path / "run"))
    job = cluster.submit("--nodes=2", "--ntasks-per-node=1", tmp_path / "job.sh", cwd=tmp_path)
    (state,) = cluster.wait(job)
    output = (tmp_path / f"slurm-{job}.out").read_text()
    assert state.state == "COMPLETED" and state.exit_code == 0, output
    found = json.loads((tmp_path / "run" / "preflight.json").read_text())
    assert found["ok"] and found["nodes"] == list(NODES)
    assert "answer: from all 2 nodes" in output
