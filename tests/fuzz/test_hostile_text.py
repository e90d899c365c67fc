"""Text from others stays text: in job scripts, on a terminal, in cards; odd numbers and variables are cards."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml

from launcher.cli import app
from launcher.console import ErrorCard, make_console, print_card
from launcher.job_script import group_options, literal, write_options
from launcher.site import find_site
from tests.ranks import tiny_config, write_config
from tools.prepare.share import find_job_array_share
from trainer.errors import EXIT_USER_MISTAKE, UserError
from trainer.runtime.plain_text import fit, has_control, one_line, printable, shorten
from trainer.runtime.process import restart_count

Run = Callable[..., tuple[int, str]]
ESCAPES = "a\x1b]0;owned\x07b\x1b[2Jc\x9b31md\u202ee"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process; gives its exit code, and all it printed."""

    def call(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            app(list(arguments), prog_name="maskwright")
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out + said.err

    return call


@pytest.fixture
def config(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "none.yaml").write_text("")
    monkeypatch.setenv("MASKWRIGHT_SITE", str(tmp_path / "none.yaml"))
    return str(write_config(tiny_config(workspace, tmp_path / "runs" / "my"), tmp_path / "my.yaml"))


SUBMIT = ("--tasks-per-node", "1", "--dry-run")


@pytest.mark.parametrize("key", ["run.dir", "run.name", "deepspeed", "model.tokenizer", "data.validation"])
@pytest.mark.parametrize("text", ["x\ntouch owned\n", "x\r#SBATCH --wrap=id", "x\x1b[2J", "x\0", "", " "])
def test_a_config_runs_no_shell_lines(key: str, text: str, config: str, run: Run):
    code, said = run("submit", config, f"{key}={json.dumps(text)}", *SUBMIT)
    assert code == EXIT_USER_MISTAKE
    assert key in said
    assert "one line" in said
    assert not has_control(said.replace("\n", ""))
    assert "#!/bin/bash" not in said


@pytest.mark.parametrize(
    "options",
    [
        ("--partition", "gpu\n#SBATCH --uid=0"),
        ("--account", "a\nid"),
        ("--qos", "a\rb"),
        ("--constraint", "a\x1b[2J"),
        ("--exclude", "n1\nid"),
        ("--mail-type", "END\nid"),
        ("--mail-user", "me\u2028id"),
        ("--", "--comment=a\nid"),
        ("--", "--comment", "a\nid"),
        ("--gpus-per-node", "h100\nid:8"),
        ("--gpus-per-node", "8" * 5000),
        ("--gpus-per-node", "８"),
        ("--time", "9" * 5000),
        ("--time", "1\n"),
        ("--nodes", "9" * 5000),
        ("--nodes", "9" * 12),
        ("--chain", "9" * 30),
        ("--site", "~nobody-is-called-so/site.yaml"),
        ("--site", ""),
    ],
)
def test_options_of_submit_are_refused_before_they_reach_a_script(options: Sequence[str], config: str, run: Run):
    before = SUBMIT if "--gpus-per-node" not in options else ("--dry-run",)
    code, said = run("submit", config, *before, *options)
    assert code == EXIT_USER_MISTAKE, said
    assert "#!/bin/bash" not in said
    assert len(said) < 2500


def test_the_name_of_the_current_folder_opens_no_line(
    config: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "here\n#SBATCH --uid=0"
    folder.mkdir()
    monkeypatch.chdir(folder)
    code, said = run("submit", config, *SUBMIT)
    assert code == EXIT_USER_MISTAKE
    assert "one line" in said


def test_a_percent_sign_in_the_run_folder_is_no_pattern(config: str, run: Run, tmp_path: Path):
    code, said = run("submit", config, f"run.dir={tmp_path}/a%j %b", *SUBMIT)
    assert code == 0
    assert f"#SBATCH --output='{tmp_path}/a%%j %%b/logs/slurm-%j.log'" in said
    assert f"sbatch '{tmp_path}/a%j %b/slurm/train.sbatch'" in said
    assert literal("%%") == "%%%%"
    assert run("submit", config, f"run.dir={tmp_path}/a\\b", *SUBMIT)[0] == EXIT_USER_MISTAKE


def test_script_lines_refuse_what_a_site_file_gives():
    for options in ({"partition": "a\nb"}, {"a b": 1}, {"x\ny": True}, {"": True}):
        with pytest.raises(UserError):
            write_options(options)
    with pytest.raises(UserError):
        group_options(["--x", "a\nb"])


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"command": "maskwright 'x"}, "No closing quotation"),
        ({"command": "a\nb"}, "one line"),
        ({"environment": {"A=1; id #": "x"}}, "environment"),
        ({"environment": {"A": "x\0y"}}, "control characters"),
        ({"setup": "module load x\x1b[2J"}, "control characters"),
        ({"srun": ["a\nb"]}, "one line"),
        ({"container": {"runtime": "pyxis", "image": "a\nb"}}, "one line"),
    ],
)
def test_a_site_file_with_odd_text_is_refused(content: dict, problem: str, tmp_path: Path):
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=problem):
        find_site(str(tmp_path / "site.yaml"), {})


def test_escape_sequences_do_not_reach_a_terminal():
    for stream in (io.StringIO(), Terminal()):
        print_card(ErrorCard("Please check", ESCAPES, ESCAPES, ESCAPES), stream)
        make_console(stream).print(ESCAPES)
        shown = stream.getvalue()
        assert "\\u001b]0;owned\\u0007b" in shown.replace("\n", "")
        assert not any(mark in shown for mark in ("\x1b]0", "\x1b[2J", "\x9b", "\x07", "\u202e"))
    assert json.loads(printable(json.dumps(ESCAPES, ensure_ascii=False))) == ESCAPES
    assert one_line("a\nb\tc") == "a\\u000ab\\u0009c"


def test_usage_errors_are_short_and_printable(run: Run):
    for arguments in (
        (ESCAPES,),
        ("data", ESCAPES),
        ("validate", "demo", "--nproc-per-node", ESCAPES),
        ("validate", "demo", "--" + ESCAPES),
        ("validate", "demo", "--nproc-per-node", "7" * 10_000),
        ("x" * 10_000,),
        ("doctor", "--answer-seconds", "nan"),
        ("plan", "demo", "--network-gbit", "inf"),
        ("data", "simulate", "--tokens", "1E99999999"),
        ("data", "simulate", "--seed", str(2**64)),
        ("prepare", "--input", "x", "--tokenizer", "x", "--output", "x", "--task", f"{'1' * 5000}/{'2' * 5000}"),
        ("prepare", "--input", "x", "--tokenizer", "x", "--output", "x", "--validation-fraction", "nan"),
    ):
        code, said = run(*arguments)
        assert code == EXIT_USER_MISTAKE, said
        assert len(said) < 2000
        assert not has_control(said.replace("\n", ""))


def test_cards_stay_short_whatever_a_value_holds(config: str, run: Run, tmp_path: Path):
    many = tmp_path / "many.yaml"
    many.write_text(f"extends: {config}\nbatch: {{{', '.join(f'key{n}: 1' for n in range(3000))}}}\n")
    code, said = run("validate", str(many))
    assert code == EXIT_USER_MISTAKE
    assert "And 2,995 more." in said
    assert len(said) < 2500
    code, said = run("validate", config, f"batch.micro_size={'x y ' * 20_000}")
    assert code == EXIT_USER_MISTAKE
    assert len(said) < 2500
    assert len(fit("word\n" * 10_000, 1500).splitlines()) <= 13
    assert shorten("x" * 300).endswith("x")
    stream = io.StringIO()
    print_card(ErrorCard("Please check", "x" * 10**6, "y" * 10**6, "z " * 10**6), stream)
    assert len(stream.getvalue()) < 3500


def test_what_the_system_says_of_a_file_is_a_card(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    os.rmdir(gone)
    code, said = run("status", "runs/my")
    assert code == EXIT_USER_MISTAKE
    assert "current folder" in said


@pytest.mark.parametrize("value", ["x", "", "9" * 5000, "-1", "1.5"])
def test_variables_of_slurm_that_are_no_numbers(value: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", value)
    assert restart_count() == 0
    with pytest.raises(UserError, match="SLURM_ARRAY_TASK_ID is no number"):
        find_job_array_share({"SLURM_ARRAY_TASK_ID": value, "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "0"})
    with pytest.raises(UserError, match="SLURM_ARRAY_TASK_COUNT is no number"):
        find_job_array_share({"SLURM_ARRAY_TASK_ID": "1"})
