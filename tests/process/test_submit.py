"""`maskwright submit` up to the queue: what is written, and what is refused. tests/slurm queues on a real SLURM."""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.console import make_console
from launcher.job_script import group_options, write_options
from launcher.site import EXAMPLE, SLURM_FOLDER, Site, find_site
from launcher.slurm import parse_time
from launcher.submit import Submission, submit
from tests.ranks import ADDING, tiny_config, write_config
from trainer.errors import UserError

DRY = Submission(
    config="",
    overrides=(),
    nodes=2,
    gpus_per_node=None,
    tasks_per_node=2,
    sbatch={},
    more_sbatch=(),
    site=None,
    chain=1,
    convert=False,
    convert_best=False,
    preflight=False,
    exclude_bad_nodes=False,
    dry_run=True,
)


@pytest.fixture
def run(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Submission:
    """A dry run of a tiny config, without any site file."""
    (tmp_path / "none.yaml").write_text("")
    monkeypatch.setenv("MASKWRIGHT_SITE", str(tmp_path / "none.yaml"))
    config = write_config(tiny_config(workspace, tmp_path / "runs" / "my", **ADDING), tmp_path / "my.yaml")
    return dataclasses.replace(DRY, config=str(config))


def script_of(asked: Submission, capsys: pytest.CaptureFixture[str], **changes: Any) -> str:
    submit(dataclasses.replace(asked, **changes), make_console())
    return capsys.readouterr().out


def options_in(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]


def test_a_dry_run_prints_a_script_and_writes_nothing(
    run: Submission, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submit(run, make_console())
    printed = capsys.readouterr()
    assert "batch: 8 sequences a step = 2 micro × 4 ranks × 1 accumulation" in printed.err
    assert printed.err.splitlines()[-1].startswith("dry run: 2 nodes × 2 ranks = 4 ranks"), "the last thing in view"
    script, template = printed.out, (SLURM_FOLDER / "train.sbatch").read_text()
    assert script.partition("# --- end of settings ---")[2] == template.partition("# --- end of settings ---")[2]
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-"], input=script, text=True, check=True)
    options = options_in(script)
    for option in ("--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1", "--requeue", "--signal=B:USR1@300"):
        assert option in options
    assert not [option for option in options if "gpu" in option]
    assert f"run_dir={tmp_path}/runs/my" in script.splitlines() and "on_stop=requeue" in script.splitlines()
    assert not (tmp_path / "runs").exists()


def test_options_come_from_the_command_then_the_site_then_the_template(
    run: Submission, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = {"sbatch": {"partition": "gpu", "account": "lab", "exclusive": True, "open-mode": None}, "requeue": False}
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(site))
    given = {"partition": "big", "time": "2:00:00", "qos": None}
    more = ("--mem", "0", "--comment=a b")
    script = script_of(
        run,
        capsys,
        site=str(tmp_path / "site.yaml"),
        nodes=1,
        gpus_per_node="h100:4",
        tasks_per_node=None,
        sbatch=given,
        more_sbatch=more,
    )
    options = options_in(script)
    expected = {"--partition=big", "--account=lab", "--exclusive", "--time=2:00:00", "--gpus-per-node=h100:4"}
    assert expected <= set(options) and "--ntasks-per-node=4" in options
    assert options[-2:] == ["--mem 0", "'--comment=a b'"]
    assert "--no-requeue" in options and "--requeue" not in options and "on_stop=exit" in script.splitlines()
    assert not [option for option in options if "open-mode" in option or "qos" in option]


def test_the_conversion_of_the_best_evaluation(
    run: Submission, workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = dataclasses.replace(run, convert=True)
    assert "options=()" in script_of(asked, capsys).splitlines()
    with pytest.raises(UserError, match="The checkpoint of the best evaluation is not kept"):
        script_of(asked, capsys, convert_best=True)
    kept = {
        "checkpoint": {"keep_best": True},
        "data": {"validation": str(workspace / "data")},
        "eval": {"every_steps": 5},
    }
    config = write_config(tiny_config(workspace, tmp_path / "runs" / "my", **ADDING, **kept), tmp_path / "best.yaml")
    lines = script_of(asked, capsys, config=str(config), convert_best=True).splitlines()
    assert "options=(--best)" in lines


def test_containers_modules_and_variables_are_lines_of_the_script(
    run: Submission, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = yaml.safe_load(EXAMPLE.read_text())
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(site))
    lines = script_of(run, capsys, site=str(tmp_path / "site.yaml"), convert=True).splitlines()
    assert lines.count("module load cuda/12.8") == 2 and lines.count("export NCCL_SOCKET_IFNAME=ib0") == 2
    assert lines.count("maskwright=(/shared/maskwright/.venv/bin/maskwright)") == 2
    pyxis = next(line for line in lines if line.startswith("srun_options="))
    assert shlex.split(pyxis.removeprefix("srun_options=(").removesuffix(")")) == [
        "--mpi=none",
        "--container-image=/shared/images/maskwright.sqsh",
        "--container-mounts=/shared:/shared,/scratch/data:/data",
        "--container-env=NCCL_SOCKET_IFNAME,MASTER_ADDR,OMP_NUM_THREADS,SLURM_JOB_END_TIME",
    ]
    assert "#SBATCH --partition=cpu" in lines, "for the conversion"

    site["container"] = {"runtime": "apptainer", "image": "/i.sif", "mounts": ["/data"], "options": ["--nv"]}
    apptainer = Site.model_validate({**site, "command": None})
    assert apptainer.srun_options() == ["--mpi=none"]
    assert apptainer.command_words() == ["apptainer", "exec", "--bind", "/data", "--nv", "/i.sif", "maskwright"]
    assert "export APPTAINERENV_NCCL_SOCKET_IFNAME=ib0" in apptainer.setup_lines()


@pytest.mark.parametrize(
    ("changes", "where", "words"),
    [
        ({"nodes": 3}, "batch.global_size", "8"),
        ({"tasks_per_node": None}, "--gpus-per-node", "How many ranks"),
        ({"gpus_per_node": "0", "tasks_per_node": None}, "--gpus-per-node", "How many ranks"),
        ({"gpus_per_node": "8"}, "--tasks-per-node 2", "each GPU has one rank"),
        ({"gpus_per_node": "many"}, "--gpus-per-node", "'many' is no number"),
        ({"more_sbatch": ("--nodes=4",)}, "--nodes=4", "maskwright sets --nodes itself"),
        ({"more_sbatch": ("-d", "singleton"), "chain": 2}, "-d", "maskwright sets -d itself"),
        ({"chain": 2, "exclude_bad_nodes": True}, "--chain", "jobs of a chain"),
        ({"sbatch": {"time": "5"}}, "--time 5", "hardly trains"),
        ({"sbatch": {"time": "soon"}}, "--time soon", "no time limit"),
        ({"site": "nosuch.yaml"}, "--site nosuch.yaml", "no site file"),
        ({"overrides": ("batch.micro=3",)}, "batch.micro", "Did you mean"),
    ],
)
def test_a_mistake_is_named_before_anything_is_queued(
    run: Submission, changes: dict[str, Any], where: str, words: str
) -> None:
    with pytest.raises(UserError) as error:
        submit(dataclasses.replace(run, **changes), make_console())
    assert where in error.value.where and words in str(error.value) and error.value.remedy


def test_without_sbatch_it_says_where_to_go(run: Submission, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"There is no sbatch on this machine.*--dry-run"):
        submit(dataclasses.replace(run, dry_run=False), make_console())


def test_a_typo_in_the_site_file_is_named_with_the_nearest_key(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text("container: {runtime: pyxis, imag: a}")
    with pytest.raises(UserError, match=r"Unknown key 'container.imag'. Did you mean 'image'\?.*site.example.yaml"):
        find_site(None, {"MASKWRIGHT_SITE": str(path)})


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("1:30:00", 5400),
        ("2-0", 172800),
        ("2-12:30", 217800),
        ("1-0:0:5", 86405),
        ("UNLIMITED", None),
    ],
)
def test_slurms_time_limits(text: str, seconds: int | None) -> None:
    assert parse_time(text) == seconds


def test_options_are_quoted_for_a_line_of_the_script() -> None:
    assert write_options({"output": "/a b/c", "exclusive": True, "qos": None, "hold": False}) == [
        "--output='/a b/c'",
        "--exclusive",
    ]
    assert group_options(["-p", "gpu", "--mem=0"]) == ["-p gpu", "--mem=0"]


@pytest.mark.parametrize("name", ["train", "convert"])
def test_the_scripts_have_the_marks_that_submit_fills_in(name: str) -> None:
    text = (SLURM_FOLDER / f"{name}.sbatch").read_text()
    assert len(re.findall(r"^# --- settings: ", text, re.MULTILINE)) == 1
    assert text.count("# --- end of settings ---") == 1
