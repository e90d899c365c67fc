"""Several local ranks, as real processes: exit codes, the first cause, signals, and nothing left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from launcher.local import core_count, launch
from tests.waiting import TIMEOUT_S, is_running, wait_for

PRELUDE = """
import atexit, os, signal, sys, time
from pathlib import Path
from launcher.rank import ERROR_FILE_VARIABLE, ended_file
atexit.register(ended_file(Path(os.environ[ERROR_FILE_VARIABLE])).touch)
signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())  # a rank is born with them held back
rank = int(os.environ["RANK"])
here = Path(os.environ["TEST_FOLDER"])
def report(error):
    def work():
        raise error
    from launcher.rank import run_rank
    sys.exit(run_rank(work, None))
def note(name, text=""):
    (here / name).write_text(str(text))
def wait_for(name):
    while not (here / name).exists():
        time.sleep(0.01)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TEST_FOLDER", str(tmp_path))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return tmp_path


def rank_command(folder: Path, script: str) -> list[str]:
    path = folder / "rank.py"
    path.write_text(PRELUDE + textwrap.dedent(script))
    return [sys.executable, str(path)]


def launch_script(folder: Path, script: str, process_count: int = 2, grace_s: float = 15.0) -> int:
    return launch(rank_command(folder, script), process_count, folder, grace_s=grace_s)


def start_launcher(folder: Path, script: str, process_count: int = 2, grace_s: float = 15.0) -> subprocess.Popen[str]:
    """The launcher in a process of its own, to send signals to."""
    arguments = (rank_command(folder, script), process_count, grace_s)
    code = (
        "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL); "  # under nohup, tests are born with it ignored
        "import sys; from pathlib import Path; from launcher.local import launch; "
        f"command, count, grace = {arguments!r}; sys.exit(launch(command, count, Path({str(folder)!r}), grace_s=grace))"
    )
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for_files(folder: Path, *names: str) -> None:
    wait_for(lambda: all((folder / name).exists() for name in names), f"the files {names}")


def wait_until_gone(pids: list[int]) -> None:
    wait_for(lambda: not any(is_running(pid) for pid in pids), f"the end of {pids}")


@pytest.mark.parametrize(("codes", "expected"), [((0, 0), 0), ((75, 75), 75), ((0, 75), 75), ((0, 3), 3), ((75, 4), 4)])
def test_exit_codes_of_the_ranks_make_one(folder: Path, codes: tuple[int, int], expected: int) -> None:
    assert launch_script(folder, f"sys.exit({codes!r}[rank])") == expected


def test_exit_code_0_without_the_work_done_is_a_failure(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch_script(folder, "os._exit(0) if rank else None") == 1
    assert "rank 1 ended with exit code 0 and left no report" in capfd.readouterr().err


def test_ranks_get_the_variables_of_torch_distributed(folder: Path) -> None:
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"]
    assert launch_script(folder, f"note(f'env{{rank}}', ' '.join(os.environ[n] for n in {names!r}))", 3) == 0
    found = [(folder / f"env{rank}").read_text().split() for rank in range(3)]
    ports = {values[5] for values in found}
    assert len(ports) == 1 and 1024 <= int(ports.pop()) <= 65535
    threads = str(max(1, core_count() // 3))
    for rank, values in enumerate(found):
        assert values[:5] == [str(rank), str(rank), "3", "3", "127.0.0.1"]
        assert values[6] == threads


def test_a_given_thread_count_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert launch_script(folder, "sys.exit(os.environ['OMP_NUM_THREADS'] != '7')") == 0


def test_the_first_cause_is_shown_not_its_echo(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = launch_script(
        folder,
        """
        if rank == 1:
            import atexit
            atexit.register(note, "reported")
            report(ValueError("the true cause"))
        wait_for("reported")
        report(RuntimeError("Connection closed by peer"))
        """,
    )
    shown = capfd.readouterr().err
    assert code == 1
    assert "Traceback (most recent call last)" in shown
    assert "ValueError: the true cause" in shown and "rank 1" in shown
    assert "Connection closed" not in shown


def test_an_error_that_all_ranks_raise_is_shown_by_the_one_it_arose_on(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = launch_script(
        folder,
        """
        from trainer.errors import mark_origin
        def fail_here():
            raise ValueError("the true cause")
        try:
            fail_here()
        except ValueError as caught:
            error = caught if rank == 1 else ValueError("the true cause")  # it comes without its traceback
        mark_origin(error, 1)
        if rank == 1:
            wait_for("reported")
        else:
            import atexit
            atexit.register(note, "reported")
        report(error)
        """,
    )
    shown = capfd.readouterr().err
    assert code == 1
    assert "fail_here" in shown and "where:  rank 1" in shown


def test_the_log_of_the_failing_rank_is_named(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = folder / "logs" / "rank-00001.log"
    log.parent.mkdir()
    log.touch()
    assert launch_script(folder, "os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else sys.exit(0)") == 1
    shown = capfd.readouterr().err
    assert "rank 1 was killed by SIGKILL" in shown
    assert f"its log: {log}" in shown


def test_an_expected_error_of_every_rank_is_one_card(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = launch_script(
        folder,
        """
        from trainer.errors import DamagedError
        report(DamagedError("a shard is cut short", where="part-00000.tok", remedy="Prepare it again."))
        """,
    )
    shown = capfd.readouterr().err
    assert code == 3
    assert shown.count("a shard is cut short") == 1
    assert "part-00000.tok" in shown and "Prepare it again." in shown
    assert "Traceback" not in shown


def test_a_killed_rank_is_the_cause_though_its_peer_reports_first(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = launch_script(
        folder,
        """
        if rank == 0:
            note("pid", os.getpid())
            time.sleep(3600)
        wait_for("pid")
        os.kill(int((here / "pid").read_text()), signal.SIGKILL)
        report(RuntimeError("Connection closed by peer"))
        """,
    )
    shown = capfd.readouterr().err
    assert code == 1
    assert "rank 0 was killed by SIGKILL" in shown
    assert "Connection closed" not in shown


def test_last_words_of_a_rank_without_report_are_shown(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script = "if rank == 1:\n    print('free(): invalid pointer', file=sys.stderr, flush=True)\n    os.abort()"
    assert launch_script(folder, script) == 1
    shown = capfd.readouterr().err
    assert "free(): invalid pointer" in shown
    assert "rank 1 was killed by SIGABRT" in shown


def test_only_the_first_rank_has_the_console(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch_script(folder, "print(f'hello from {rank}')", 3) == 0
    assert capfd.readouterr().out == "hello from 0\n"


def test_a_rank_that_hangs_while_another_failed_is_ended(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = launch_script(
        folder,
        """
        if rank == 1:
            wait_for("deaf")
            from trainer.errors import DivergedError
            report(DivergedError("losses stay non-finite"))
        signal.signal(signal.SIGTERM, lambda *_: note("terminated"))
        note("deaf", os.getpid())
        while True:
            time.sleep(1)
        """,
        grace_s=3.0,  # within which it has to note the signal, before it is killed
    )
    assert code == 4
    assert (folder / "terminated").exists()
    wait_until_gone([int((folder / "deaf").read_text())])
    assert "losses stay non-finite" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_reaches_every_rank_exactly_once(folder: Path, number: signal.Signals) -> None:
    launcher = start_launcher(
        folder,
        f"""
        received = []
        signal.signal({int(number)}, lambda *_: received.append(1))
        note(f"ready{{rank}}")
        while not received:
            time.sleep(0.02)
        time.sleep(0.5)
        note(f"count{{rank}}", len(received))
        sys.exit(75)
        """,
    )
    wait_for_files(folder, "ready0", "ready1")
    # To the whole process group, as a terminal does with Ctrl-C.
    os.killpg(launcher.pid, number)
    assert launcher.wait(timeout=TIMEOUT_S) == 75
    assert [(folder / f"count{rank}").read_text() for rank in range(2)] == ["1", "1"]


def test_a_second_interrupt_kills_at_once(folder: Path) -> None:
    launcher = start_launcher(
        folder,
        """
        signal.signal(signal.SIGINT, lambda *_: note(f"saving{rank}"))
        note(f"ready{rank}", os.getpid())
        while True:
            time.sleep(1)
        """,
    )
    wait_for_files(folder, "ready0", "ready1")
    launcher.send_signal(signal.SIGINT)
    wait_for_files(folder, "saving0", "saving1")
    launcher.send_signal(signal.SIGINT)
    _, shown = launcher.communicate(timeout=TIMEOUT_S)
    assert launcher.returncode == 130
    assert "Interrupted" in shown
    wait_until_gone([int((folder / f"ready{rank}").read_text()) for rank in range(2)])


def test_an_interrupt_before_training_says_so_without_a_traceback(folder: Path) -> None:
    launcher = start_launcher(
        folder,
        """
        def work():
            note(f"ready{rank}")
            time.sleep(3600)
        from launcher.rank import run_rank
        sys.exit(run_rank(work, None))
        """,
    )
    wait_for_files(folder, "ready0", "ready1")
    launcher.send_signal(signal.SIGINT)
    _, shown = launcher.communicate(timeout=TIMEOUT_S)
    assert launcher.returncode == 130
    assert shown.strip() == "Interrupted."


def test_ranks_die_with_a_killed_launcher(folder: Path) -> None:
    launcher = start_launcher(folder, 'note(f"pid{rank}", os.getpid())\ntime.sleep(3600)')
    wait_for_files(folder, "pid0", "pid1")
    launcher.kill()
    launcher.wait()
    wait_until_gone([int((folder / f"pid{rank}").read_text()) for rank in range(2)])


def test_workers_of_a_rank_are_gone_when_launch_returns(folder: Path) -> None:
    code = launch_script(
        folder,
        """
        import subprocess
        worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
        note(f"worker{rank}", worker.pid)
        os._exit(rank)
        """,
    )
    assert code == 1
    wait_until_gone([int((folder / f"worker{rank}").read_text()) for rank in range(2)])


def test_nothing_is_left_in_the_temporary_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = folder / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    assert launch_script(folder, "report(ValueError('no')) if rank else None") == 1
    assert list(scratch.iterdir()) == []


def test_a_real_traceback_names_the_line(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    launch_script(folder, "report(KeyError('embeddings')) if rank else None")
    assert re.search(r'File ".*rank\.py", line \d+, in work', capfd.readouterr().err)
