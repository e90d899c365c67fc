"""What doctor says: lines of a state, a finding and a remedy, for a person, an issue or a program."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from trainer.errors import EXIT_FINISHED, EXIT_USER_MISTAKE, MaskwrightError

State = Literal["ok", "warn", "fail"]
_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@dataclass(frozen=True)
class Line:
    """One finding.

    Attributes:
        node: of a job's check, the node that it is about; empty for all of them.
        remedy: what to do about a warn or a fail.
    """

    state: State
    name: str
    finding: str
    remedy: str = ""
    node: str = ""

    def __str__(self) -> str:
        where = f"{self.name} ({self.node})" if self.node else self.name
        return f"{self.state:<4}  {where}: {self.finding}{f'  → {self.remedy}' if self.remedy else ''}"


@dataclass(frozen=True)
class DoctorReport:
    """What doctor found out.

    Attributes:
        bad_nodes: of a job's check: nodes that should be left out.
    """

    lines: list[Line]
    bad_nodes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not any(line.state == "fail" for line in self.lines)

    @property
    def exit_code(self) -> int:
        return EXIT_FINISHED if self.ok else EXIT_USER_MISTAKE

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, "bad_nodes": self.bad_nodes, "lines": [asdict(line) for line in self.lines]}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    def print(self, console: Console) -> None:
        for line in self.lines:
            text = Text(str(line))
            text.stylize(_COLOURS[line.state], 0, 4)
            console.print(text)
        fails = sum(line.state == "fail" for line in self.lines)
        warns = sum(line.state == "warn" for line in self.lines)
        console.print(f"{len(self.lines) - fails - warns} ok, {warns} warn, {fails} fail")
        if self.bad_nodes:
            console.print(
                f"bad nodes: {', '.join(self.bad_nodes)}  → leave them out: --exclude={','.join(self.bad_nodes)}"
            )


def checked(name: str, check: Callable[[], list[Line]]) -> list[Line]:
    """Run a check and return its lines; what it raises is a finding, too."""
    try:
        return check()
    except MaskwrightError as error:
        where = f" [{error.where}]" if error.where else ""
        return [Line("fail", name, f"{error.problem}{where}", error.remedy)]
    except Exception as error:  # a broken installation raises anything
        return [Line("fail", name, f"{type(error).__name__}: {error}", "Repair the installation: make setup.")]
