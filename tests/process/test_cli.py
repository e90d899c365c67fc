"""The commands as a user types them: help, usage errors, cards and exit codes."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from launcher.cli import app
from launcher.command import parse_count
from tests.waiting import TIMEOUT_S

COMMANDS = [
    ("demo",),
    ("tokenizer", "train"),
    ("prepare",),
    ("data", "show"),
    ("data", "verify"),
    ("data", "simulate"),
    ("validate",),
    ("train",),
    ("bench", "loader"),
    ("bench", "prepare"),
    ("status",),
    ("report",),
    ("evaluate",),
    ("doctor",),
    ("checkpoint", "list"),
    ("checkpoint", "verify"),
    ("convert",),
]
HEAVY = ("torch", "transformers", "deepspeed", "datasets", "numpy")


def maskwright(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "COLUMNS": "200", **variables}
    command = [sys.executable, "-m", "launcher", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=environ)


def assert_is_a_card(result: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom launcher.cli import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        f"print('heavy:', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "heavy: []"


def test_help_answers_in_half_a_second() -> None:
    def seconds() -> float:
        """Of processor time: what the clock shows also depends on what else the machine does."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert maskwright("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(5)) < 0.5


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_of_every_command_has_an_example(command: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, [*command, "--help"], prog_name="maskwright", env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert f"  maskwright {' '.join(command)} " in result.output


def test_version() -> None:
    assert maskwright("--version").stdout == "maskwright 0.1.0\n"


@pytest.mark.parametrize(
    "arguments",
    [("trian",), ("train",), ("train", "demo", "--nproc", "2"), ("prepare", "--input", "x", "--format", "pdf")],
    ids=" ".join,
)
def test_usage_errors_exit_2(arguments: tuple[str, ...]) -> None:
    assert_is_a_card(maskwright(*arguments), 2)


def test_started_as_a_module_it_imports_nothing_else_from_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "yaml.py").write_text("raise SystemExit(0)\n")
    (tmp_path / "my.yaml").write_text("{}")
    command = [sys.executable, "-m", "launcher", "validate", "my.yaml"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("Please check: "), result


def test_unknown_recipe_is_a_card() -> None:
    assert_is_a_card(maskwright("train", "nosuch"), 2, "nosuch", "remedy:")


def test_an_error_in_the_config_is_shown_once_before_any_rank_starts(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("modle: {preset: roberta-base}\n")
    result = maskwright("train", str(config), "--nproc-per-node", "2")
    assert_is_a_card(result, 2, "Did you mean 'model'?")
    assert result.stderr.count("modle") <= 2  # in the problem and in `where`


def test_process_count_must_not_contradict_torchrun() -> None:
    variables = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29400",
    }
    assert_is_a_card(maskwright("train", "demo", "--nproc-per-node", "4", **variables), 2, "--nproc-per-node", "remedy")


def test_command_ends_with_card_or_code_of_its_function() -> None:
    """A real command class around functions of our own: each kind of ending."""
    code = """
import typer
from launcher.command import Command
from trainer.errors import DamagedError
app = typer.Typer(pretty_exceptions_enable=False)
@app.command(cls=Command)
def end(how: str, inputs: list[str] = typer.Option(["-"], "--input"), n: int = 0) -> int | None:
    if how == "damaged": raise DamagedError("cut short", where="a.tok", remedy="Again.")
    if how == "interrupt": raise KeyboardInterrupt
    if how == "bug": raise ValueError("boom")
    print(inputs, n)
    return 75 if how == "stopped" else None
app()
"""

    def end(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)

    assert_is_a_card(end("damaged"), 3, "Damaged: cut short", "a.tok", "Again.")
    interrupted = end("interrupt")
    assert (interrupted.returncode, interrupted.stderr) == (130, "Interrupted.\n")
    bug = end("bug")
    assert bug.returncode == 1
    assert "ValueError: boom" in bug.stderr
    assert end("stopped").returncode == 75
    several = end("finished", "--input", "a", "b", "--n", "3")
    assert (several.returncode, several.stdout) == (0, "['a', 'b'] 3\n")


def test_input_takes_several_values_as_a_shell_expands_them(tmp_path: Path) -> None:
    result = maskwright("tokenizer", "train", "--input", "a.txt", "b.txt", "--nosuch")
    assert_is_a_card(result, 2, "No such option")
    assert "unexpected extra argument" not in result.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--task", "3/3"), ("There is no task 3/3", "--task 3/3", "the last of 3 is 2/3")),
        (("--task", "a/b"), ("'a/b' is no task", "--task a/b", "0/8 for the first of 8")),
        (("--task", "0/3", "--finalize"), ("exclude each other", "--finalize alone")),
    ],
)
def test_a_task_that_cannot_be_is_refused_at_once(
    options: tuple[str, ...], words: tuple[str, ...], tmp_path: Path
) -> None:
    paths = ("--input", str(tmp_path), "--tokenizer", "nosuch", "--output", str(tmp_path / "out"))
    assert_is_a_card(maskwright("prepare", *paths, *options), 2, *words)


@pytest.mark.parametrize(
    ("text", "value"), [("0", 0), ("8_192", 8192), ("10T", 10**13), ("1.5g", 1_500_000_000), ("2B", 2 * 10**9)]
)
def test_counts_with_a_suffix(text: str, value: int) -> None:
    assert parse_count(text) == value


@pytest.mark.parametrize("text", ["", "K", "-1", "1.5", "0.0001K", "10X", "inf", "10E", "T10"])
def test_what_is_no_count(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        parse_count(text)
