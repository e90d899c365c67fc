"""`slurm/prepare.sbatch` under a real SLURM: a job array, and a job that joins when all of it has succeeded."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.preparing import folder_hashes
from tests.slurm.cluster import SlurmCluster
from tools.prepare import prepare
from tools.prepare.plan import MINIMUM_UNIT_BYTES

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "slurm" / "prepare.sbatch"


@pytest.fixture
def maskwright(tmp_path: Path) -> Path:
    """The command of this Python, as a script that a job can call by its path."""
    path = tmp_path / "maskwright"
    path.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m launcher "$@"\n')
    path.chmod(0o755)
    return path


def write_rows(path: Path, units: int) -> Path:
    """JSON lines that make `units` units, though they hold little text: most of a row is another field."""
    text = [" ".join(f"word{(row * 7 + place) % 90}" for place in range(20)) for row in range(units * 200)]
    filling = "x" * (MINIMUM_UNIT_BYTES // 200)
    path.write_text(
        "".join(json.dumps({"id": row, "other": filling, "text": line}) + "\n" for row, line in enumerate(text))
    )
    return path


def test_a_job_array_and_the_job_after_it_give_the_bytes_of_a_plain_prepare(
    cluster: SlurmCluster, workspace: Path, maskwright: Path, tmp_path: Path
) -> None:
    write_rows(tmp_path / "rows.jsonl", units=5)
    rows = f"{tmp_path}/row*.jsonl"
    options = ("--cpus-per-task=1", "--time=5")
    variables = {
        "INPUT": rows,
        "TOKENIZER": str(workspace / "tokenizer"),
        "OUTPUT": str(tmp_path / "array"),
        "MASKWRIGHT": str(maskwright),
    }
    arguments = (SCRIPT, "--validation-fraction", "0.1")
    array = cluster.submit(*options, "--array=0-2", *arguments, cwd=tmp_path, **variables)
    after = (f"--dependency=afterok:{array}", "--kill-on-invalid-dep=yes")
    join = cluster.submit(*options, *after, *arguments, cwd=tmp_path, **variables, FINALIZE="1")
    # Beside it one whose tasks fail: its last job is not left waiting.
    variables |= {"INPUT": f"{tmp_path}/nosuch.jsonl", "OUTPUT": str(tmp_path / "failed")}
    failing = cluster.submit(*options, "--array=0-1", *arguments, cwd=tmp_path, **variables)
    after = (f"--dependency=afterok:{failing}", "--kill-on-invalid-dep=yes")
    never = cluster.submit(*options, *after, *arguments, cwd=tmp_path, **variables, FINALIZE="1")
    prepare([rows], str(workspace / "tokenizer"), str(tmp_path / "plain"), workers=1, validation_fraction=0.1)

    def logs() -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(tmp_path.glob("*.log")))

    assert [state.exit_code for state in cluster.wait(array)] == [0, 0, 0], logs()
    assert [state.state for state in cluster.wait(join)] == ["COMPLETED"], logs()
    assert folder_hashes(tmp_path / "array") == folder_hashes(tmp_path / "plain")
    assert len(list((tmp_path / "plain" / "train").glob("*.tok"))) == 6
    for task in range(3):
        assert f"Task {task}/3, from SLURM_ARRAY_TASK_ID={task}" in logs()
    assert [state.exit_code for state in cluster.wait(failing)] == [2, 2]
    assert [state.state for state in cluster.wait(never)] == ["CANCELLED"]
    assert not (tmp_path / "failed").exists()
