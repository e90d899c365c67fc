"""What `maskwright bench recipe` found: JSON for programs, a table and curves for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tools.bench.common import Figure, Measurement, markdown_table
from tools.machine import machine_line

_COLUMNS = ("arm", "seconds to it", "tokens to it", "lowest loss", "at tokens", "tokens/s", "what")


@dataclass(frozen=True)
class RecipeMeasurement(Measurement):
    """One arm with one seed, up to its end: `wall_seconds` are those of training, `cpu_seconds` of its processes.

    Attributes:
        curve: [step, tokens, seconds of training, held-out loss] of each evaluation.
    """

    curve: list[list[float]]

    def reaching(self, target: float) -> list[float] | None:
        """Find the first evaluation at or below a loss."""
        return next((point for point in self.curve if point[3] <= target), None)

    @property
    def best(self) -> list[float]:
        """The evaluation with the lowest loss."""
        return min(self.curve, key=lambda point: point[3])

    @property
    def tokens_per_second(self) -> float:
        """Speed of training; 0 where the first weights were at the loss already."""
        return self.tokens / self.wall_seconds if self.wall_seconds else 0.0


@dataclass(frozen=True)
class Arm:
    """One of the things compared."""

    name: str
    what: str


@dataclass(frozen=True)
class RecipeReport:
    """The result of a benchmark of recipes.

    Attributes:
        settings: what was asked for, as plain JSON.
        measurements: of each arm, one a seed.
        target: the loss to reach; None where all were trained to their end.
        first: the arm that others are compared with.
    """

    settings: dict[str, Any]
    machine: dict[str, Any]
    arms: Sequence[Arm]
    measurements: dict[str, list[RecipeMeasurement]]
    target: float | None
    first: str

    def to_target(self, name: str, place: int) -> Figure | None:
        """Find seconds (place 2) or tokens (1) to the target; None unless all seeds reached it."""
        if self.target is None:
            return None
        found = [row.reaching(self.target) for row in self.measurements[name]]
        return Figure.of([point[place] for point in found if point]) if all(found) else None

    def ratio(self, name: str, place: int) -> Figure | None:
        """Find how many times as much an arm took to the target as the first one, seed by seed; None if that took 0."""
        if self.to_target(name, place) is None or self.to_target(self.first, place) is None or self.target is None:
            return None
        pairs = zip(self.measurements[name], self.measurements[self.first], strict=True)
        both = [(one.reaching(self.target), other.reaching(self.target)) for one, other in pairs]
        if not all(other and other[place] for _, other in both):
            return None
        return Figure.of([one[place] / other[place] for one, other in both if one and other])

    def facts(self, name: str) -> dict[str, Any]:
        """Collect what is known of an arm, as plain JSON."""
        rows = self.measurements[name]
        found = {"seconds_to_loss": 2, "tokens_to_loss": 1}
        return {
            "what": next(arm.what for arm in self.arms if arm.name == name),
            **{key: _json(self.to_target(name, place)) for key, place in found.items()},
            "reached": None if self.target is None else sum(row.reaching(self.target) is not None for row in rows),
            "lowest_loss": asdict(Figure.of([row.best[3] for row in rows])),
            "tokens_per_second": asdict(Figure.of([row.tokens_per_second for row in rows])),
            "cpu_seconds": asdict(Figure.of([row.cpu_seconds for row in rows])),
            "curves": [row.curve for row in rows],
            "over_first": {key: _json(self.ratio(name, place)) for key, place in found.items()},
        }

    def to_json(self) -> str:
        facts = {
            "benchmark": "recipe",
            "settings": self.settings,
            "machine": self.machine,
            "arms": {arm.name: self.facts(arm.name) for arm in self.arms},
        }
        return json.dumps(facts, indent=1, ensure_ascii=False)

    def to_markdown(self) -> str:
        lines = [markdown_table([_COLUMNS, *self._rows()]), *self._lines()]
        return "\n\n".join(lines) + "\n"

    def print(self, console: Console) -> None:
        """Print the same for a person."""
        table = Table(box=None, pad_edge=False)
        for number, heading in enumerate(_COLUMNS):
            table.add_column(heading, justify="right" if 0 < number < len(_COLUMNS) - 1 else "left", overflow="fold")
        for row in self._rows():
            table.add_row(*row)
        console.print(table)
        for line in self._lines():
            console.print(line, highlight=False, soft_wrap=True)

    def _rows(self) -> list[list[str]]:
        return [self._row(arm) for arm in self.arms]

    def _row(self, arm: Arm) -> list[str]:
        rows = self.measurements[arm.name]
        seconds, tokens = (self.to_target(arm.name, place) for place in (2, 1))
        missing = "–"
        if self.target is not None:
            reached = sum(row.reaching(self.target) is not None for row in rows)
            missing = f"{reached} of {len(rows)}"
        best = Figure.of([row.best[3] for row in rows])
        return [
            arm.name,
            missing if seconds is None else _spread(seconds, ",.0f"),
            missing if tokens is None else _spread(tokens, ",.0f"),
            _spread(best, ".4f"),
            f"{Figure.of([row.best[1] for row in rows]).median:,.0f}",
            f"{Figure.of([row.tokens_per_second for row in rows]).median:,.0f}",
            arm.what,
        ]

    def _lines(self) -> list[str]:
        lines = []
        for arm in self.arms:
            if arm.name == self.first or (seconds := self.ratio(arm.name, 2)) is None:
                continue
            tokens = self.ratio(arm.name, 1)
            assert tokens is not None
            lines.append(
                f"{arm.name} takes {_spread(seconds, '.2f')} × the seconds and {_spread(tokens, '.2f')} × the tokens "
                f"of {self.first}"
            )
        target = "to the end" if self.target is None else f"to a held-out loss of {self.target:g}"
        seeds = ", ".join(map(str, self.settings["seeds"]))
        lines.append(
            f"{target}; seeds {seeds}: median and spread. Seconds of training, without starting and evaluating; a loss "
            "is looked at every so many steps, so both are rounded up to those."
        )
        return [*lines, machine_line(self.machine)]


def draw_curves(report: RecipeReport, path: Path) -> None:
    """Draw each arm's held-out loss over tokens and over seconds, a line a seed, as a PNG file."""
    from matplotlib.figure import Figure as Drawing

    drawing = Drawing(figsize=(11, 4.4), layout="constrained")
    panels = drawing.subplots(1, 2, sharey=True)
    for place, axes, label in ((1, panels[0], "tokens"), (2, panels[1], "seconds of training")):
        for number, arm in enumerate(report.arms):
            for seed, row in enumerate(report.measurements[arm.name]):
                points = [point for point in row.curve if point[0]]  # the loss of the first weights flattens the rest
                axes.plot(
                    [point[place] for point in points],
                    [point[3] for point in points],
                    color=f"C{number}",
                    linewidth=1.2,
                    label=arm.name if not seed else None,
                )
        if report.target is not None:
            axes.axhline(report.target, color="#808080", linestyle=":", linewidth=1)
        axes.set_xlabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("held-out loss")
    panels[0].legend(frameon=False)
    drawing.savefig(path, format="png", dpi=120)


def _spread(figure: Figure, form: str) -> str:
    median = f"{figure.median:{form}}"
    return median if figure.lowest == figure.highest else f"{median} ({figure.lowest:{form}}–{figure.highest:{form}})"


def _json(figure: Figure | None) -> dict[str, float] | None:
    return None if figure is None else asdict(figure)
