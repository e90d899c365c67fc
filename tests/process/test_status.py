"""`maskwright status`: what it says of runs that train, ended, died, or were of an older version."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.commands import assert_one_card, maskwright, start_maskwright
from tests.waiting import TIMEOUT_S
from tools.status import SILENCE_S, look_at, status_lines
from trainer.errors import EXIT_FINISHED, EXIT_USER_MISTAKE
from trainer.liveness.heartbeat import Heartbeat, heartbeat_path
from trainer.tracking.status import Status, change_status

NOW = {"host": "elsewhere", "pid": 1, "world_size": 2, "nodes": ("n1", "n2")}


def make_run(run_dir: Path, age_s: float = 0.0, ages: tuple[float, ...] = (), **fields: Any) -> Path:
    """A run folder with a status, and heartbeats of these ages."""
    run_dir.mkdir(exist_ok=True)
    now = time.time()
    change_status(run_dir, **{**NOW, "state": "training", "started_at": now - 9000, **fields})
    status = json.loads((run_dir / "status.json").read_text())
    (run_dir / "status.json").write_text(json.dumps({**status, "updated_at": now - age_s}))
    for rank, age in enumerate(ages):
        path = heartbeat_path(run_dir, rank)
        path.parent.mkdir(exist_ok=True)
        beat = Heartbeat(rank, now - age, 3, 1.0, 7, "step", 9, 0.0, f"n{rank + 1}", "elsewhere", 1)
        path.write_text(json.dumps(asdict(beat)))
    return run_dir


def shown(run_dir: Path) -> str:
    return "\n".join(status_lines(look_at(str(run_dir))))


def test_a_run_in_full(tmp_path: Path) -> None:
    make_run(
        tmp_path,
        ages=(2.0, 3.0),
        step=50,
        total_steps=200,
        tokens=1_234_567,
        train_loss=6.70894,
        tokens_per_second=2046.0,
        eta_seconds=599.6,
        best_step=30,
        best_loss=6.54321,
        last_checkpoint="step-00000040",
        branch_of="/runs/trunk/checkpoints/step-00001000",
        restarts=3,
        job_id="77",
    )
    words = (
        "training\n",
        "50/200 (25.0%)",
        "1,234,567",
        "6.7089",
        "2,046 tokens/s",
        "0:10:00",
        "best        step 30, eval/loss 6.5432",
        "step-00000040",
        "branch      of /runs/trunk at step 1,000",
        "restarts    3",
        "job         77",
        "n1, n2",
        "heartbeat   0:00:02 old",
    )
    for word in words:
        assert word in shown(tmp_path)
    assert "DEAD" not in shown(tmp_path)


@pytest.mark.parametrize(
    ("age_s", "ages", "death"),
    [
        (3600.0, (3600.0, 3600.0), "no rank has given a sign of life for 1:00:00"),
        (3600.0, (), "nothing has been heard for 1:00:00"),
        (3600.0, (1.0, 1.0), ""),  # a long evaluation: nothing new to say, and alive
        (60.0, (), ""),  # starting
        (9.0, (SILENCE_S / 2, SILENCE_S / 2), ""),
    ],
)
def test_a_run_that_looks_dead_is_said_to(age_s: float, ages: tuple[float, ...], death: str, tmp_path: Path) -> None:
    view = look_at(str(make_run(tmp_path, age_s, ages)))
    assert view.death == death
    assert view.to_dict()["looks_dead"] is bool(death)
    assert ("BUT IT LOOKS DEAD" in shown(tmp_path)) is bool(death)


def test_a_silent_rank_among_living_ones_is_named(tmp_path: Path) -> None:
    make_run(tmp_path, ages=(1.0, 300.0))
    assert "silent      rank 1 on n2 for 0:05:00" in shown(tmp_path)


def test_a_process_that_is_gone_tells_sooner_on_its_own_machine(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    make_run(tmp_path, 10.0, (10.0, 10.0), host=socket.gethostname(), pid=int(ended.stdout))
    assert "is gone" in look_at(str(tmp_path)).death
    make_run(tmp_path, 10.0, (10.0, 10.0), host=socket.gethostname(), pid=os.getpid())
    assert look_at(str(tmp_path)).death == ""


@pytest.mark.parametrize("state", ["finished", "stopped", "failed", "diverged"])
def test_an_ended_run_is_not_dead_and_watching_it_ends(state: str, tmp_path: Path) -> None:
    make_run(tmp_path, 9000.0, (9000.0,), state=state, reason="so it is")
    assert f"{state} (so it is)" in shown(tmp_path) and "DEAD" not in shown(tmp_path)
    assert look_at(str(tmp_path)).ended


def test_an_old_run_without_a_status_is_told_from_its_metrics_and_checkpoints(tmp_path: Path) -> None:
    lines = [
        {"step": 10, "samples": 80, "tokens": 640, "time": 1.7e9, "train/loss": 5.25},
        {"step": 10, "eval/loss": 5.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 11, "tr')
    for name in ("step-00000005", "step-00000010"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000005" / "manifest.json").write_text("{}")
    text = shown(tmp_path)
    for word in ("unknown: the run has written no status.json", "step        10", "640", "5.2500", "step-00000005"):
        assert word in text
    assert look_at(str(tmp_path)).to_dict()["state"] == "unknown"


def test_the_command_prints_json_watches_to_the_end_and_refuses_what_is_no_run(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", ages=(1.0,), step=3)
    result = maskwright("status", run_dir, "--json")
    assert result.returncode == EXIT_FINISHED
    found = json.loads(result.stdout)
    assert found.keys() >= {*asdict(Status()), "heartbeat_age_seconds", "looks_dead", "silent_ranks"}
    assert (found["state"], found["step"], found["looks_dead"]) == ("training", 3, False)

    watching = start_maskwright("status", run_dir, "--watch", fresh=True)
    assert watching.stdout is not None
    assert watching.stdout.readline().strip() == str(run_dir)
    change_status(run_dir, state="finished", step=9)
    rest = watching.stdout.read()
    assert watching.wait(TIMEOUT_S) == EXIT_FINISHED
    assert "state       finished" in rest and rest.count("state  ") == 2, "once for each change"

    (tmp_path / "empty").mkdir()
    for place in ("empty", "nowhere"):
        assert_one_card(maskwright("status", tmp_path / place), EXIT_USER_MISTAKE, "There is no run in", place)


def test_status_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        f"import sys\nfrom launcher.cli import app\ntry:\n    app(['status', {str(make_run(tmp_path))!r}])\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "print('heavy:', [name for name in ('torch', 'numpy', 'transformers') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert result.stdout.splitlines()[-1] == "heavy: []", result.stderr
