"""Hold a run at a step for as long as a test needs, so that what the test does there races nothing."""

from __future__ import annotations

import os
import time
from pathlib import Path

_VARIABLE = "MASKWRIGHT_TEST_GATE"
_SITE = f"""
import os
if "RANK" in os.environ and {_VARIABLE!r} in os.environ:
    from tests.gate import wait_at_the_gate
    wait_at_the_gate()
"""


class Gate:
    """A file that says which step is the last one that ranks may train: before the next one all of them wait.

    When that step is in the metrics, all ranks are there. Signals reach them, and are answered when the gate opens.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "gate"
        site = folder / "site-of-the-gate"
        site.mkdir()
        (site / "sitecustomize.py").write_text(_SITE)
        paths = [str(site), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        self.environment = {_VARIABLE: str(self._path), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        """Variables with which every Python that a command starts as a rank waits at this gate."""

    def close_after(self, step: int) -> None:
        """Let no rank train beyond a step."""
        temporary = self._path.with_name("gate.new")
        temporary.write_text(str(step))
        temporary.replace(self._path)

    def open(self) -> None:
        """Let them go on to the end."""
        self._path.unlink(missing_ok=True)


def wait_at_the_gate() -> None:
    """Runs in a rank: look at the gate before each step."""
    from trainer.loop import Loop

    train_step, path = Loop._train_step, Path(os.environ[_VARIABLE])

    def is_open(step: int) -> bool:
        try:
            return step <= int(path.read_text())
        except FileNotFoundError:
            return True

    def step_when_open(self: Loop, *arguments: object) -> object:
        while not is_open(self.state.step + 1):
            time.sleep(0.02)
        return train_step(self, *arguments)  # type: ignore[arg-type]

    Loop._train_step = step_when_open  # type: ignore[method-assign,assignment]
