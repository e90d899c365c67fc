"""Ctrl-C while a command starts: 130 and one line, wherever its imports stand."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.console import EXIT_INTERRUPTED
from tests.waiting import TIMEOUT_S, wait_for

ROOT = Path(__file__).parents[2]
HOLD = """
import os, sys, time
from pathlib import Path

class Hold:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["HELD_MODULE"] and os.environ.get("RANK") in eval(os.environ["HELD_RANKS"]):
            sys.meta_path.remove(self)
            Path(os.environ["HELD_FOLDER"], os.environ.get("RANK", "alone")).touch()
            try:
                time.sleep(3600)
            except KeyboardInterrupt as error:
                raise ImportError(f"cannot import {name}") from error

sys.meta_path.insert(0, Hold())
"""


@pytest.mark.parametrize(
    ("arguments", "module", "ranks"),
    [
        ("train demo", "typer", [None]),
        ("train demo", "torch", ["0"]),
        ("train demo --nproc-per-node 2", "typer", ["0", "1"]),
        ("train demo --nproc-per-node 2", "torch", ["1"]),
        ("plan demo", "typer", [None]),
        ("plan demo", "torch", [None]),
    ],
)
def test_ctrl_c_in_an_import_is_130_and_one_line(
    arguments: str, module: str, ranks: list[str | None], tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(HOLD)
    (tmp_path / "held").mkdir()
    environ = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "OMP_NUM_THREADS": "1"}
    environ |= {"HELD_MODULE": module, "HELD_RANKS": repr(ranks), "HELD_FOLDER": str(tmp_path / "held")}
    command = [sys.executable, "-P", "-m", "launcher", *arguments.split(), f"run.dir={tmp_path / 'run'}"]
    process = subprocess.Popen(
        command, env=environ, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )

    def is_held() -> bool:
        assert process.poll() is None, "not held"
        return len(list((tmp_path / "held").iterdir())) == len(ranks)

    wait_for(is_held, "the import")
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=TIMEOUT_S)[0]
    assert (process.returncode, output) == (EXIT_INTERRUPTED, "Interrupted.\n")
    assert not (tmp_path / "run").exists()
