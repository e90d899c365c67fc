"""What one rank tells when something goes wrong, under our launcher, torchrun, srun, or alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.rank import ERROR_FILE_VARIABLE, ErrorReport, run_rank
from tests.waiting import TIMEOUT_S
from trainer.errors import UserError, mark_origin

BATCH_ERROR = UserError("batch does not divide", where="batch.global_size", remedy="Set it to 8.")


def raising(error: BaseException):
    def work() -> int:
        raise error

    return work


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(ERROR_FILE_VARIABLE, raising=False)
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)

    def become(rank: int) -> None:
        monkeypatch.setenv("RANK", str(rank))

    return become


def test_the_exit_code_of_the_work_is_returned(as_rank) -> None:
    as_rank(0)
    assert run_rank(lambda: 75, None) == 75


def test_under_the_launcher_a_report_is_written_and_nothing_printed(
    as_rank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    as_rank(3)
    monkeypatch.setenv(ERROR_FILE_VARIABLE, str(tmp_path / "error.json"))
    before = time.time()
    assert run_rank(raising(BATCH_ERROR), None) == 2
    report = ErrorReport.read(tmp_path / "error.json")
    assert report is not None
    assert before <= report.timestamp <= time.time()
    assert (report.rank, report.kind, report.exit_code) == (3, "UserError", 2)
    assert (report.problem, report.where, report.remedy) == (
        "batch does not divide",
        "batch.global_size",
        "Set it to 8.",
    )
    assert report.traceback == ""
    assert capsys.readouterr() == ("", "")


def test_an_unexpected_error_reports_its_traceback_and_log(
    as_rank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_rank(1)
    log = tmp_path / "logs" / "rank-00001.log"
    log.parent.mkdir()
    log.touch()
    monkeypatch.setenv(ERROR_FILE_VARIABLE, str(tmp_path / "error.json"))
    assert run_rank(raising(ValueError("boom")), tmp_path) == 1
    found = json.loads((tmp_path / "error.json").read_text())
    assert "ValueError: boom" in found["traceback"]
    assert found["log"] == str(log)


def test_a_rank_without_report_reads_as_none(tmp_path: Path) -> None:
    assert ErrorReport.read(tmp_path / "error.json") is None


def test_without_a_launcher_rank_0_prints_the_card(as_rank, capsys: pytest.CaptureFixture[str]) -> None:
    as_rank(0)
    assert run_rank(raising(BATCH_ERROR), None) == 2
    shown = capsys.readouterr().err
    assert "batch does not divide" in shown and "Set it to 8." in shown and "Traceback" not in shown


def test_without_a_launcher_other_ranks_print_one_line(as_rank, capsys: pytest.CaptureFixture[str]) -> None:
    as_rank(3)
    assert run_rank(raising(BATCH_ERROR), None) == 2
    assert capsys.readouterr().err == "[rank 3] batch does not divide Set it to 8.\n"


def test_without_a_launcher_an_error_of_all_ranks_is_said_once(as_rank, capsys: pytest.CaptureFixture[str]) -> None:
    shown = {}
    for rank in range(3):
        as_rank(rank)
        error = ValueError("boom")
        mark_origin(error, 1)
        run_rank(raising(error), None)
        shown[rank] = capsys.readouterr().err
    assert "where:  rank 1" in shown[0]
    assert shown[1].startswith("[rank 1] ValueError: boom")
    assert shown[2] == ""


def test_a_traceback_that_is_in_the_log_is_pointed_to_else_printed(
    as_rank, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    as_rank(3)
    log = tmp_path / "logs" / "rank-00003.log"
    log.parent.mkdir()
    log.write_text("nothing of interest\n")
    run_rank(raising(ValueError("boom")), tmp_path)
    assert "Traceback (most recent call last)" in capsys.readouterr().err
    log.write_text("Traceback ...\nValueError: boom\n")
    run_rank(raising(ValueError("boom")), tmp_path)
    assert capsys.readouterr().err == f"[rank 3] ValueError: boom The traceback is in {log}\n"


def test_torchrun_gets_its_error_file(as_rank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_rank(2)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "torch.json"))
    assert run_rank(raising(ValueError("boom")), None) == 1
    assert "ValueError: boom" in (tmp_path / "torch.json").read_text()


def test_a_stop_signal_during_start_up_waits_for_the_handlers() -> None:
    code = """
import os, signal
from trainer.runtime.signals import hold_stop_signals
hold_stop_signals()
os.kill(os.getpid(), signal.SIGUSR1)
from trainer.runtime.signals import stop_requests
with stop_requests() as request:
    print(request.signal_name)
os.kill(os.getpid(), signal.SIGTERM)
print("alive")
"""
    environ = {**os.environ, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=TIMEOUT_S)
    assert result.stdout.split() == [signal.SIGUSR1.name, "alive"]
    assert result.returncode == 0
