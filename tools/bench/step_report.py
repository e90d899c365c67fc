"""What `maskwright bench step` found: JSON for programs, tables and a bar chart for people."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from tools.bench.common import Figure, markdown_table
from tools.bench.step_work import StepMeasurement, StepVariant
from tools.machine import machine_line

PHASES = ("data", "forward", "backward", "optimizer")
_GIB = 2**30


@dataclass(frozen=True)
class Peaks:
    """FLOP/s of one rank's device at best.

    Attributes:
        measured: of a square matmul, just before the variants.
        datasheet: the maker's dense figure; None where none is known.
    """

    device: str
    measured: float
    datasheet: float | None


@dataclass(frozen=True)
class StepReport:
    """The result of a benchmark of the training step.

    Attributes:
        settings: the work, as plain JSON.
        measurements: of each variant, one a round.
        compared: pairs of variants, the first over the second.
        loss_bound: how far the losses of two variants may be apart.
    """

    settings: dict[str, Any]
    machine: dict[str, Any]
    peaks: Peaks
    variants: Sequence[StepVariant]
    measurements: dict[str, list[StepMeasurement]]
    compared: Sequence[tuple[str, str]]
    loss_bound: float

    @property
    def loss_difference(self) -> float:
        """The largest difference of two variants' losses at any step, in nats."""
        return float(np.max(self._loss_differences()))  # numpy's functions give NaN where there is one

    @property
    def parting_step(self) -> int:
        """The first step, from 1 on, at which losses are further apart than their bound; 0 if there is none."""
        return next((step for step, value in enumerate(self._loss_differences(), 1) if not value <= self.loss_bound), 0)

    def _loss_differences(self) -> list[float]:
        """Compute the largest difference of loss between variants with the same dropout, at each step.

        Those that had ended are left out.
        """
        found = [0.0]
        for dropped in (True, False):
            curves = [
                self.measurements[variant.name][0].losses
                for variant in self.variants
                if (variant.attention_dropout or self.settings["dropout"] == 0.0) == dropped
                and variant.is_the_same_work
            ]
            differences = [float(np.ptp(step)) for step in zip(*curves, strict=False)]
            found = [float(np.maximum(*pair)) for pair in itertools.zip_longest(found, differences, fillvalue=0.0)]
        return found

    @property
    def losses_agree(self) -> bool:
        return self.loss_difference <= self.loss_bound  # False for NaN, too

    def speed(self, name: str) -> Figure:
        """Compute the tokens a second by the clock, over all ranks."""
        return Figure.of([row.tokens / row.wall_seconds for row in self.measurements[name]])

    def speed_ratio(self, name: str, over: str) -> Figure:
        """Compute the ratio of two variants' tokens a second, round by round."""
        pairs = zip(self.measurements[name], self.measurements[over], strict=True)
        return Figure.of(
            [(one.tokens / one.wall_seconds) / (other.tokens / other.wall_seconds) for one, other in pairs]
        )

    def facts(self, name: str) -> dict[str, Any]:
        """Collect what is known of a variant, as plain JSON; medians over the rounds."""
        rows = self.measurements[name]
        speed, first = self.speed(name), rows[0]
        per_rank = speed.median * first.flops_per_token / self.settings["ranks"]
        step_seconds = statistics.median(row.wall_seconds / row.steps for row in rows)
        first_step = statistics.median(row.first_step_seconds for row in rows)
        reached = [row.seconds_to_loss for row in rows if row.seconds_to_loss is not None]
        return {
            "what": next(variant.what for variant in self.variants if variant.name == name),
            "tokens_per_second": speed.median,
            "tokens_per_second_spread": [speed.lowest, speed.highest],
            "seconds_per_step": step_seconds,
            "cpu_seconds_per_step": statistics.median(row.cpu_seconds / row.steps for row in rows),
            "phase_milliseconds": {
                phase: 1000 * statistics.median(row.phases.get(phase, 0.0) for row in rows) for phase in PHASES
            },
            "communication_milliseconds": 1000 * statistics.median(row.communication for row in rows),
            "flops_per_token": first.flops_per_token,
            "teraflops_per_rank": per_rank / 1e12,
            "mfu": {
                "measured": per_rank / self.peaks.measured,
                "datasheet": None if self.peaks.datasheet is None else per_rank / self.peaks.datasheet,
            },
            "peak_memory_gib": statistics.median(row.peak_bytes for row in rows) / _GIB,
            "first_step_seconds": first_step,
            "start_up_seconds": max(0.0, first_step - step_seconds),
            "last_loss": first.losses[-1],
            "seconds_to_loss": statistics.median(reached) if len(reached) == len(rows) else None,
            "operators": first.operators,
        }

    def ratio(self, name: str, over: str) -> dict[str, Any]:
        one, other = self.facts(name), self.facts(over)
        seconds = one["seconds_to_loss"], other["seconds_to_loss"]
        return {
            "tokens_per_second": asdict(self.speed_ratio(name, over)),
            "peak_memory": one["peak_memory_gib"] / other["peak_memory_gib"],
            "seconds_to_loss": None if None in seconds else seconds[1] / seconds[0],
        }

    def to_json(self) -> str:
        facts = {
            "benchmark": "step",
            "machine": self.machine,
            "peaks": asdict(self.peaks),
            "settings": self.settings,
            "variants": {variant.name: self.facts(variant.name) for variant in self.variants},
            "ratios": {f"{name}/{over}": self.ratio(name, over) for name, over in self.compared},
            "losses": {
                "agree": self.losses_agree,
                "largest_difference": self.loss_difference,
                "bound": self.loss_bound,
                "curves": {name: rows[0].losses for name, rows in self.measurements.items()},
            },
        }
        return json.dumps(facts, indent=1, ensure_ascii=False)

    def print(self, console: Console) -> None:
        """Print the same for a person, without the profiles."""
        headings, *rows = self._table()
        table = Table(box=None, pad_edge=False)
        table.add_column(headings[0], no_wrap=True)
        for heading in headings[1:]:
            table.add_column(heading, justify="right", overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        legend = (f"{variant.name}: {variant.what}" for variant in self.variants)
        for line in ["; ".join(legend), *self._ratio_lines(), *self._notes()]:
            console.print(line)

    def to_markdown(self) -> str:
        """Write the tables, the ratios, the notes, and the profile of each of our variants as Markdown."""
        legend = [f"`{variant.name}`: {variant.what}" for variant in self.variants]
        parts = [
            markdown_table(self._table()),
            "",
            *(f"- {line}" for line in [*legend, *self._ratio_lines(), *self._notes()]),
        ]
        for variant in self.variants:
            operators = self.measurements[variant.name][0].operators
            if operators:
                rows = [[row["name"], f"{row['milliseconds']:.1f}", f"{row['calls']:g}"] for row in operators]
                heading = f"\nOperators of `{variant.name}`, by their own time:\n"
                parts += [heading, markdown_table([["operator", "ms a step", "calls a step"], *rows])]
        return "\n".join(parts) + "\n"

    def _table(self) -> list[list[str]]:
        to_loss = self.settings["target_loss"] is not None
        headings = ["variant", "tokens/s", "spread", "ms a step", *PHASES, "comm.", "TFLOP/s", "MFU"]
        table = [[*headings, "peak GiB", "first step s", *["s to loss"] * to_loss]]
        for variant in self.variants:
            facts = self.facts(variant.name)
            low, high = facts["tokens_per_second_spread"]
            reached = facts["seconds_to_loss"]
            table.append(
                [
                    variant.name,
                    f"{facts['tokens_per_second']:,.0f}",
                    f"{low:,.0f}–{high:,.0f}",
                    f"{1000 * facts['seconds_per_step']:,.1f}",
                    *(f"{facts['phase_milliseconds'][phase]:,.1f}" for phase in PHASES),
                    f"{facts['communication_milliseconds']:,.1f}",
                    f"{facts['teraflops_per_rank']:.3g}",
                    f"{100 * facts['mfu']['measured']:.1f} %",
                    f"{facts['peak_memory_gib']:.2f}",
                    f"{facts['first_step_seconds']:.1f}",
                    *(["not reached" if reached is None else f"{reached:.1f}"] * to_loss),
                ]
            )
        return table

    def _ratio_lines(self) -> list[str]:
        lines = []
        for name, over in self.compared:
            found, speed = self.ratio(name, over), self.speed_ratio(name, over)
            line = f"{name} over {over}: {speed.median:.2f} × tokens/s ({speed.lowest:.2f}–{speed.highest:.2f})"
            line += f", {found['peak_memory']:.2f} × peak memory"
            if found["seconds_to_loss"] is not None:
                line += f", {found['seconds_to_loss']:.2f} × as fast to the loss"
            lines.append(line)
        return lines

    def _notes(self) -> list[str]:
        done, rounds = self.settings, max(len(rows) for rows in self.measurements.values())
        verdict = "the losses agree" if self.losses_agree else "THE LOSSES DIFFER: the variants do not do the same work"
        verdict += f": largest difference {self.loss_difference:.2g}, bound {self.loss_bound:g}"
        if len(self.variants) == 1:
            verdict = "one variant: there are no losses to compare"
        peak = f"{self.peaks.measured / 1e12:.3g} TFLOP/s, a matmul measured on {self.peaks.device}"
        if self.peaks.datasheet is not None:
            peak += f"; its data sheet says {self.peaks.datasheet / 1e12:.4g}"
        return [
            verdict,
            f"{done['model']}, {done['micro_size']} × {done['seq_len']} a rank, {done['ranks']} ranks of "
            f"{done['threads']} threads, {done['precision']}; {rounds} rounds of {done['steps']} steps after "
            f"{done['warmup_steps']}; medians",
            f"MFU: the model's FLOPs, its head at predicted positions only, over {peak}",
            machine_line(self.machine),
        ]


def draw_chart(report: StepReport, path: Path) -> None:
    """Draw a bar for each variant's tokens a second, with its spread over the rounds, as a PNG file."""
    from matplotlib.figure import Figure

    names = [variant.name for variant in report.variants]
    speeds = [report.speed(name) for name in names]
    medians = [speed.median for speed in speeds]
    spreads = [[speed.median - speed.lowest for speed in speeds], [speed.highest - speed.median for speed in speeds]]
    figure = Figure(figsize=(9.6, 1.1 + 0.44 * len(names)), layout="constrained")
    axes = figure.subplots()
    colours = ["#1f77b4" if variant.loop == "ours" else "#b0b0b0" for variant in report.variants]
    bars = axes.barh(names, medians, xerr=spreads, color=colours, capsize=3)
    axes.bar_label(bars, [f"{median:,.0f}" for median in medians], padding=6)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    settings = report.settings
    axes.set_title(
        f"tokens/s: {settings['model']}, {settings['micro_size']} × {settings['seq_len']}, {report.peaks.device}",
        loc="left",
        parse_math=False,
    )
    figure.savefig(path, format="png")
