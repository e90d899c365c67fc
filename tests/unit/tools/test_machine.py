"""What is said of a machine; compilers that are not there are faked."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from launcher.cli import app
from tools.bench.step import default_steps
from tools.doctor.machine import check_compilers, check_versions
from tools.machine import compile_obstacle, describe_machine, machine_line
from trainer.runtime.versions import installed_version


@pytest.fixture
def whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with all that compiling for GPUs needs, as far as it is looked at."""
    (tmp_path / "bin").mkdir()
    for name in ("gcc", "g++"):
        (tmp_path / "bin" / name).write_text("#!/bin/sh\necho compiler 1.2\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "triton.py").touch()
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "Python.h").touch()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / name))
    return tmp_path


@pytest.mark.parametrize(
    ("missing", "on_gpus", "on_cpu"),
    [
        ((), None, None),
        (("triton.py",), "the package triton", None),
        (("bin/gcc",), "needs a C compiler", None),
        (("include/Python.h",), "include/Python.h is not there", None),
        (("bin/g++",), None, "needs a C++ compiler"),
    ],
)
def test_what_torch_compile_lacks_is_named(
    missing: tuple[str, ...], on_gpus: str | None, on_cpu: str | None, whole: Path
) -> None:
    """Gpu A13: on GPUs it is not a C++ compiler that is needed, but Triton's three."""
    for name in missing:
        (whole / name).unlink()
    for cuda, said in ((True, on_gpus), (False, on_cpu)):
        found = compile_obstacle(cuda)
        assert (found is None) == (said is None), found
        assert said is None or said in str(found)


def test_doctor_says_so_with_the_remedy(whole: Path) -> None:
    (line, *_) = check_compilers()
    assert (line.state, line.name, line.finding) == ("ok", "compiler", "compiler 1.2")
    (whole / "bin" / "g++").unlink()
    (line, *_) = check_compilers()
    assert line.state == "warn" and "needs a C++ compiler" in line.finding and "Install g++" in line.remedy


def test_a_figure_from_a_gpu_has_the_versions_below_torch(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not {"CUDA", "driver"} & describe_machine(with_gpus=True)["versions"].keys(), "torch is built for the CPU"
    smi = whole / "bin" / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 580.95.05\necho 580.95.05\n")
    smi.chmod(0o755)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 9))
    machine = describe_machine(with_gpus=True)
    expected = {"CUDA": "13.0", "cuDNN": "91900", "NCCL": "2.28.9", "driver": "580.95.05"}
    assert expected.items() <= machine["versions"].items()
    assert "NCCL 2.28.9, driver 580.95.05" in machine_line(machine)
    assert "CUDA" not in describe_machine()["versions"]


@pytest.mark.parametrize(("cuda", "steps"), [(False, (8, 2)), (True, (50, 10))])
def test_steps_on_a_gpu_are_timed_when_its_clocks_have_settled(
    cuda: bool, steps: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gpu A7."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert default_steps() == steps


def test_a_copy_that_runs_from_its_folder_is_told_so(whole: Path) -> None:
    installed_version.cache_clear()  # `whole` hides what pip knows
    try:
        (line,) = check_versions()
        shown = CliRunner().invoke(app, ["--version"])
    finally:
        installed_version.cache_clear()
    assert (line.state, line.name) == ("fail", "maskwright") and "make setup" in line.remedy
    assert (shown.exit_code, shown.output) == (0, "maskwright (run from a folder, not installed)\n")
