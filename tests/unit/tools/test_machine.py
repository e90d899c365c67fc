"""What is said of a machine; compilers that are not there are faked."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import pytest

from tools.doctor.machine import check_compilers
from tools.machine import compile_obstacle


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
