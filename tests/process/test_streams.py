"""A console that cannot be written, in each way there is, with real descriptors."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.waiting import TIMEOUT_S
from trainer.runtime.streams import ConsoleStream, first_loss, reader_has_left

SPEAK = r"""
import sys
from pathlib import Path
from trainer.runtime.streams import use_consoles
use_consoles()
from rich.console import Console
for _ in range(3):
    print("8 \u00d7 16")
    Console(stderr=True).print("a name: \udcb2")
with open("opened", "w") as file:
    print("out"), print("err", file=sys.stderr)
    file.write("a file")
"""


@pytest.mark.parametrize(
    "redirection", [">/dev/full 2>/dev/full", ">&-", "2>&-", "<&- >&- 2>&-", "| true", "2>&1 | true", "2>/dev/full"]
)
def test_what_cannot_be_printed_is_lost_and_nothing_else(redirection: str, tmp_path: Path) -> None:
    environ = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(Path(__file__).parents[2])}
    (tmp_path / "speak.py").write_text(SPEAK)
    command = f'"{sys.executable}" speak.py {redirection}; exit ${{PIPESTATUS[0]}}'
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environ, cwd=tmp_path)
    assert result.returncode == 0
    assert result.stdout.splitlines() in ([], ["8 \\xd7 16"] * 3 + ["out"]), "characters that ASCII lacks are escapes"
    assert result.stderr.splitlines() in ([], ["a name: \\udcb2"] * 3 + ["err"])
    assert (tmp_path / "opened").read_text() == "a file", "no closed descriptor became that of a file"


def test_the_first_reason_is_kept_and_a_reader_that_left_is_known() -> None:
    reading, writing = os.pipe()
    console = ConsoleStream(writing)
    print("read", file=console)
    assert first_loss(console) is None and not reader_has_left(console)
    os.close(reading)
    assert reader_has_left(console), "before anything is written"
    print("nobody", file=console)
    error = first_loss(console)
    assert error is not None and error.errno == errno.EPIPE
    os.close(writing)
    print("closed", file=console)
    assert first_loss(console) is error


def test_a_reader_that_waits_holds_up_the_work_once_and_what_it_missed_is_lost() -> None:
    reading, writing = os.pipe()
    console = ConsoleStream(writing, patience_s=0.2)
    start = time.monotonic()
    for number in range(3000):
        print(f"{number:04d} {'.' * 95}", file=console)
    assert 0.2 <= time.monotonic() - start < 60, "far from 3,000 times"
    lines = os.read(reading, 1 << 20).decode().splitlines()
    assert [line[:4] for line in lines[:3]] == ["0000", "0001", "0002"] and 100 < len(lines) < 3000
    print("read again", file=console)
    assert os.read(reading, 100).endswith(b"read again\n")


def test_a_descriptor_that_does_not_block_gets_everything() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    command = f'import os, time; time.sleep(0.3); data = os.fdopen({reading}, "rb").read(); print(len(data))'
    reader = subprocess.Popen([sys.executable, "-c", command], pass_fds=[reading], stdout=subprocess.PIPE, text=True)
    console = ConsoleStream(writing)
    console.write("x" * 300_000)
    console.flush()
    os.close(writing)
    assert reader.communicate(timeout=TIMEOUT_S)[0] == "300000\n"
