"""Hold a run, or a preparation, at a point for as long as a test needs, so that what it does there races nothing."""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path

_POLL_S = 0.02
_OF_RANKS = ("RANK", "SLURM_STEP_ID")
_RECORD = re.compile(r"/(unit|shard)-\d+\.json$")


class Gate:
    """A file that says after which step ranks wait, all of them.

    When that step is in the metrics, rank 0 is there. A signal to stop is answered there, without another step.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "gate"
        self.environment = _environment(folder, "gate-of-steps", f"wait_at_the_gate({str(self.path)!r})", _OF_RANKS)
        """Variables with which every Python that a command starts as a rank waits at this gate."""

    def close_after(self, step: int) -> None:
        """Let no rank train beyond a step."""
        temporary = self.path.with_name("gate.new")
        temporary.write_text(str(step))
        temporary.replace(self.path)

    def open(self) -> None:
        """Let them go on to the end."""
        self.path.unlink(missing_ok=True)


def wait_at_the_gate(path: str | Path) -> None:
    """Runs in a rank: look at the gate before each step."""
    from trainer.loop import Loop

    agree = Loop._agree

    def is_closed(step: int) -> bool:
        try:
            return step > int(Path(path).read_text())
        except FileNotFoundError:
            return False

    def agree_when_open(self: Loop, *arguments: object) -> object:
        while is_closed(self.state.step + 1) and not self.stop.received:
            time.sleep(_POLL_S)
        return agree(self, *arguments)  # type: ignore[arg-type]

    Loop._agree = agree_when_open  # type: ignore[method-assign,assignment]


def record_gate(folder: Path, limit: int, unit_bytes: int | None = None) -> dict[str, str]:
    """Variables with which processes that prepare or import wait, when so many units are finished, for their end.

    Each worker may finish one more.

    Args:
        unit_bytes: of text that a unit has, in place of MINIMUM_UNIT_BYTES, so that a small text has several.
    """
    return _environment(folder, f"gate-of-{limit}-records", f"wait_before_records({limit}, {unit_bytes})")


def wait_before_records(limit: int, unit_bytes: int | None = None) -> None:
    """Runs in a process that prepares or imports: wait where the record of a unit gets its name."""
    if unit_bytes is not None:
        import tools.prepare.plan

        tools.prepare.plan.MINIMUM_UNIT_BYTES = unit_bytes

    def watch(event: str, arguments: tuple) -> None:
        if event == "os.rename" and _RECORD.search(new := os.fsdecode(arguments[1])):
            while sum(1 for path in Path(new).parent.iterdir() if _RECORD.search(str(path))) >= limit:
                time.sleep(_POLL_S)

    sys.addaudithook(watch)


def _environment(folder: Path, name: str, call: str, only_with: tuple[str, ...] = ("PATH",)) -> dict[str, str]:
    """Variables with which every Python that has one of `only_with` makes a call of this module as it starts."""
    site = folder / name
    site.mkdir()
    lines = ("import os", f"if os.environ.keys() & set({only_with!r}):", f"    import tests.gate; tests.gate.{call}")
    (site / "sitecustomize.py").write_text("\n".join(lines) + "\n")
    paths = [str(site), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
