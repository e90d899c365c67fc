"""RUN/starts.jsonl, and when a job's restarts are judged to lead nowhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.errors import EXIT_UNEXPECTED, MaskwrightError
from trainer.tracking.starts import read_start_records, record_start


def start(run_dir: Path, monkeypatch: pytest.MonkeyPatch, step: int, job: str, restart: int, limit: int | None) -> str:
    for name, value in {"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": str(restart)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_JOB_NODELIST", "gpu[03-04]")
    return record_start(run_dir, step, 16, limit)


def test_every_start_is_a_line_and_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert start(tmp_path, monkeypatch, 0, "7", 0, 3) == (
        "start 1 of this run: SLURM job 7, restart 0, 16 ranks on gpu[03-04]"
    )
    assert start(tmp_path, monkeypatch, 40, "7", 1, 3).startswith("start 2 of this run: SLURM job 7, restart 1")
    recorded = [
        (entry.step, entry.job, entry.restart, entry.nodes, entry.world) for entry in read_start_records(tmp_path)
    ]
    assert recorded == [(0, "7", 0, "gpu[03-04]", 16), (40, "7", 1, "gpu[03-04]", 16)]


def test_a_job_that_starts_again_and_again_at_one_step_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(tmp_path, monkeypatch, 0, "7", 0, 2)
    for restart in (1, 2):
        start(tmp_path, monkeypatch, 40, "7", restart, 2)
    with pytest.raises(
        MaskwrightError, match=r"SLURM job 7 makes no progress: it has started 2 times at step 40"
    ) as error:
        start(tmp_path, monkeypatch, 40, "7", 3, 2)
    assert error.value.exit_code == EXIT_UNEXPECTED, "a code that nothing requeues"
    assert len(read_start_records(tmp_path)) == 3

    start(tmp_path, monkeypatch, 40, "7", 3, None)  # no limit
    start(tmp_path, monkeypatch, 50, "7", 4, 2)  # progress
    for _ in range(3):
        start(tmp_path, monkeypatch, 50, "", 0, 2)  # by hand, outside SLURM
    start(tmp_path, monkeypatch, 50, "8", 0, 2)  # a job that somebody has submitted since


def test_a_torn_line_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(tmp_path, monkeypatch, 0, "7", 0, 3)
    with open(tmp_path / "starts.jsonl", "a") as file:
        file.write('{"time": 1')
    start(tmp_path, monkeypatch, 1, "7", 1, 3)
    start(tmp_path, monkeypatch, 2, "7", 2, 3)
    assert [entry.step for entry in read_start_records(tmp_path)] == [0, 1, 2]
