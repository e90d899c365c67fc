"""The built wheel, installed beside its dependencies, in a folder whose files have the names of modules."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import torch
import yaml

from launcher.__main__ import PACKAGES
from tests.waiting import TIMEOUT_S
from trainer.checkpoint.find import checkpoints_folder

ROOT = Path(__file__).parents[2]
NAMES = ("trainer", "launcher", "tools", "types", "datasets", "torch", "signal", "yaml", "multiprocessing")
ENDS_AT_ONCE = "raise SystemExit(0)\n"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh environment with the wheel in it; the dependencies are those of the tests."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder), "."]
    passed_over = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist", "runs", "demo", "tests")
    source = shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=passed_over)  # the build writes there
    run(build, source)
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "env")}))
    (packages / "dependencies.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    (wheel,) = folder.glob("*.whl")
    run([*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)], folder)
    return python


def run(command: list[str], folder: Path, code: int = 0) -> str:
    """Run a command to its end, outside of the clone; returns all that it printed."""
    unset = ("PYTHONPATH", "PYTHONSAFEPATH")
    environ = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(
        command, cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == code, done.stdout
    return done.stdout


def installed(python: Path) -> Path:
    return Path(run([str(python), "-P", "-c", "import trainer; print(trainer.__path__[0])"], Path("/")).strip()).parent


def test_the_wheel_holds_what_ships(python: Path) -> None:
    packages = installed(python)
    for folder, inside in (("ds_configs", "trainer/ds_configs"), ("slurm", "launcher/slurm")):
        shipped = {path.name: path.read_bytes() for path in (packages / inside).iterdir()}
        source = {path.name: path.read_bytes() for path in (ROOT / folder).iterdir() if path.suffix != ".md"}
        source.pop("site.yaml", None)  # a user's own
        assert shipped == source
    recipes = {path.name for path in (packages / "trainer" / "recipes").iterdir()}
    assert recipes == {path.name for path in (ROOT / "trainer" / "recipes").iterdir()}
    for encoder in (ROOT / "trainer" / "model" / "encoders").iterdir():
        for path in encoder.iterdir():
            if path.is_file():
                assert (packages / path.relative_to(ROOT)).read_bytes() == path.read_bytes()
    assert not [path for path in packages.iterdir() if path.name in ("tests", "slurm", "ds_configs", "docs")]
    (metadata,) = packages.glob("maskwright-*.dist-info/METADATA")
    assert {"Author: The maskwright authors", "License-Expression: MIT"} <= set(metadata.read_text().splitlines())


@pytest.mark.timeout(1800)
def test_it_works_in_a_folder_whose_files_have_the_names_of_modules(
    python: Path, workspace: Path, tmp_path: Path
) -> None:
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text(ENDS_AT_ONCE)
    config = {
        "extends": "demo",
        "model": {"tokenizer": str(workspace / "tokenizer"), "overrides": {"hidden_size": 32, "num_hidden_layers": 1}},
        "data": {"train": str(workspace / "data"), "validation": str(workspace / "data"), "seq_len": 64},
        "schedule": {"warmup_steps": 1},
        "train": {"steps": 3, "precision": "fp32"},
    }
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(config))
    maskwright = str(python.with_name("maskwright"))
    assert "#SBATCH" in run(
        [maskwright, "submit", "my.yaml", "--nodes", "1", "--gpus-per-node", "2", "--dry-run"], tmp_path
    )
    nezha = "model.preset=nezha-base"  # whose code is no module of ours
    said = run([maskwright, "train", "my.yaml", nezha, "--nproc-per-node", "2"], tmp_path)
    assert "step 3/3" in said and "finished: 3 steps" in said
    assert (checkpoints_folder(tmp_path / "run") / "step-00000003" / "manifest.json").is_file()
    assert "wrote" in run([maskwright, "report", "run"], tmp_path)  # whose template ships
    again = ["prepare", "--input", str(workspace / "text.txt"), "--tokenizer", str(workspace / "tokenizer")]
    run([maskwright, *again, "--output", "again", "--workers", "2"], tmp_path)  # whose workers come from a fork server
    assert (tmp_path / "again" / "manifest.json").is_file()


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_of_another_distribution_is_named(python: Path, tmp_path: Path, name: str) -> None:
    foreign = tmp_path / "site" / name
    foreign.mkdir(parents=True)
    (foreign / "__init__.py").write_text("")
    entry = installed(python) / "launcher" / "__main__.py"
    code = f"import runpy, sys; sys.path.insert(0, {str(foreign.parent)!r}); runpy.run_path({str(entry)!r})['main']()"
    said = run([str(python), "-P", "-c", code], tmp_path, code=2)
    assert f"Please check: The package '{name}' at {foreign / '__init__.py'} hides maskwright's" in said
    assert "remedy:" in said and "Traceback" not in said


def test_a_package_that_another_one_has_overwritten_is_named(python: Path, tmp_path: Path) -> None:
    init = installed(python) / "tools" / "__init__.py"
    own = init.read_text()
    init.write_text("")
    try:
        said = run([str(python.with_name("maskwright")), "validate", "demo"], tmp_path, code=2)
    finally:
        init.write_text(own)
    assert f"Another distribution has overwritten {init}" in said
