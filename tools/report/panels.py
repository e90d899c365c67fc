"""Which curves stand in which chart: metrics by name, known ones in an order, any other in a chart of its own."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.report.gather import RunRecord

LOSS = "Loss"
MOST_POINTS = 600  # of a curve; more are not seen, and make a page of megabytes
MOST_MARKS = 200
COLOURS = 8
"""Of the page; a colour-blind reader tells them apart (Okabe and Ito, 2008, made darker or lighter for the paper)."""
_SMOOTHED_FROM = 120  # points
_LARGEST = 1e30  # beyond it a value is a slip, and matplotlib's ticks overflow


@dataclass(frozen=True)
class Group:
    """A kind of chart.

    Attributes:
        names: pattern of the metrics in it.
        unit: of its axis; "share" for percentages.
        log: whether its axis is logarithmic.
        unless: left out where all values are this one, which says nothing.
        smoothed: whether long curves are, because their values jump from line to line.
    """

    title: str
    names: str
    unit: str = ""
    log: bool = False
    unless: float | None = None
    smoothed: bool = False


GROUPS = (
    Group(LOSS, r"(train|eval)/loss", "nats", smoothed=True),
    Group("Perplexity", r"eval/perplexity", log=True),
    Group("Accuracy", r"eval/(.+/)?([a-z_]*accuracy|precision|recall)", "share"),
    Group("Losses of the terms", r"(train/loss/.+|eval/[^/]+/loss)", "nats"),
    Group("Blocks without a pair", r"(train/ignored/.+|eval/[^/]+/ignored)", "share"),
    Group("Learning rate", r"train/learning_rate"),
    Group("Gradient norm, before clipping", r"train/grad_norm", log=True, smoothed=True),
    Group("Speed", r"throughput/tokens_per_second", "tokens/s", smoothed=True),
    Group("Use of the devices' FLOP/s", r"throughput/mfu", "share"),
    Group("Waiting for data", r"time/data_wait_fraction", "share"),
    Group("Training stopped for saving", r"time/save_seconds", "seconds", unless=0),
    Group("Memory, of the largest rank", r"memory/.+", "GiB"),
    Group("Losses by source", r"source/.+/loss", "nats"),
    Group("Passes over the data", r"(train/epoch|source/.+/epochs)", "passes"),
    Group("Tokens by source", r"source/.+/tokens", "tokens"),
    Group("Sequences a step", r"batch/global_size", "sequences"),
    Group("Tokens a sequence", r"batch/seq_len", "tokens"),
    Group("Tokens of a validation block", r"eval/seq_len", "tokens"),
    Group("Rope theta", r"eval/(local_)?rope_theta", log=True),
    Group("Loss scale", r"train/loss_scale", log=True, unless=1),
    Group("Skipped steps", r"train/skipped_steps", "steps so far", unless=0),
    Group("Rollbacks", r"resilience/rollbacks", "so far", unless=0),
    Group("Samples passed over by rollbacks", r"resilience/skipped_samples", "samples", unless=0),
)


@dataclass(frozen=True)
class Curve:
    """A line of a chart.

    Attributes:
        colour: which of the page's colours.
        dash: which of the page's patterns of dashes.
        dots: whether its points are marked, because they are few.
        faint: the values themselves, behind a smoothed curve.
        last: its last value, as it was written.
    """

    label: str
    colour: int
    xs: NDArray[np.float64]
    ys: NDArray[np.float64]
    dash: int = 0
    dots: bool = False
    faint: NDArray[np.float64] | None = None
    last: float | None = None


@dataclass(frozen=True)
class Level:
    """A horizontal line to compare with."""

    label: str
    value: float


@dataclass(frozen=True)
class Mark:
    """Something that happened: start, skip, rollback or diverged."""

    kind: str
    x: float


@dataclass(frozen=True)
class Panel:
    """One chart; `xs` says what its horizontal axis counts."""

    title: str
    xs: str
    unit: str
    log: bool
    curves: list[Curve]
    levels: list[Level] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)

    @property
    def is_smoothed(self) -> bool:
        return any(curve.faint is not None for curve in self.curves)


def make_panels(runs: list[RunRecord]) -> list[Panel]:
    """Make the charts of the page, those of several runs over each other."""
    panels = []
    found = {name for run in runs for line in run.lines for name in line if "/" in name}
    names = sorted(found, key=lambda name: (not name.startswith("train/"), name))
    for group in (*GROUPS, *_unknown(names)):
        of_group = [name for name in names if re.fullmatch(group.names, name)]
        if (panel := _panel(runs, group, of_group, "step")) is not None:
            panels.append(panel)
            # Steps of different sizes cannot be compared; what was seen can.
            if group.title == LOSS and len({ratio for run in runs for ratio in _tokens_a_step(run)}) > 1:
                over_tokens = _panel(runs, group, of_group, "tokens")
                panels += [over_tokens] if over_tokens is not None else []
    return panels


def _unknown(names: Iterable[str]) -> Iterator[Group]:
    for name in names:
        if not any(re.fullmatch(group.names, name) for group in GROUPS):
            yield Group(name, re.escape(name))


def _panel(runs: list[RunRecord], group: Group, names: list[str], xs: str) -> Panel | None:
    """Make a chart; None where there is nothing to draw in it."""
    curves = []
    for number, run in enumerate(runs):
        for which, name in enumerate(names):
            label = name if len(runs) == 1 else run.name if len(names) == 1 else f"{run.name}: {name}"
            colour = which if len(runs) == 1 else number
            dash = which + colour // COLOURS  # where colours come again, dashes tell the lines apart
            curves += _curve(run, name, xs, group, label, colour, dash)
    if not curves:
        return None
    marks = [mark for run in runs for mark in _marks(run, xs)] if len(runs) == 1 else []
    log = group.log and all((curve.ys[np.isfinite(curve.ys)] > 0).all() for curve in curves)
    return Panel(group.title, xs, group.unit, log, curves, _levels(runs, group, names), marks[:MOST_MARKS])


def _curve(run: RunRecord, name: str, xs: str, group: Group, label: str, colour: int, dash: int) -> Iterator[Curve]:
    """Make the curve of a metric of one run; none where it has no value, or none that says anything."""
    points = [(_number(line.get(xs)), _number(line[name]), line[name]) for line in run.lines if name in line]
    x, y = (np.array([point[axis] for point in points], np.float64) for axis in (0, 1))
    x_is_known = np.isfinite(x)
    x, y = x[x_is_known], y[x_is_known]
    if not np.isfinite(y).any() or (y[np.isfinite(y)] == group.unless).all():
        return
    last = next(value for _, number_of, value in reversed(points) if math.isfinite(number_of))
    thin_x, thin_y = thin_out(x, y)
    if group.smoothed and len(y) >= _SMOOTHED_FROM:
        yield Curve(label, colour, thin_x, np.interp(thin_x, x, _smoothed(y)), dash, faint=thin_y, last=last)
    else:
        yield Curve(label, colour, thin_x, thin_y, dash, dots=name.startswith("eval/") and len(y) < 60, last=last)


def _smoothed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Average each value with those around it, a fiftieth of them all; gaps count for nothing."""
    half = max(1, len(values) // 100)
    known = np.isfinite(values)
    sums, counts = (np.concatenate([[0.0], np.cumsum(each)]) for each in (np.where(known, values, 0.0), known))
    places = np.arange(len(values))
    low, high = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    with np.errstate(invalid="ignore"):
        return (sums[high] - sums[low]) / (counts[high] - counts[low])


def thin_out(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Keep, of more than MOST_POINTS, the lowest and the highest of each stretch, so that no spike is lost."""
    if len(x) <= MOST_POINTS:
        return x, y
    kept = [0, len(x) - 1]
    for stretch in np.array_split(np.arange(len(x)), MOST_POINTS // 2):
        values = y[stretch]
        if np.isfinite(values).any():
            kept += [int(stretch[np.nanargmin(values)]), int(stretch[np.nanargmax(values)])]
    chosen = np.unique(kept)
    return x[chosen], y[chosen]


def _levels(runs: list[RunRecord], group: Group, names: list[str]) -> list[Level]:
    """Say what losses compare with: what is the same for all runs, and only where the loss is that of tokens alone."""
    levels = []
    sizes, unigrams = {run.vocabulary_size for run in runs}, {run.unigram for run in runs}
    if len(sizes) == 1 and (size := sizes.pop()) is not None:
        levels.append(Level("a uniform guess, ln V", math.log(size)))
    if len(unigrams) == 1 and (unigram := unigrams.pop()) is not None:
        levels.append(Level("guessing by frequency", unigram))
    if names == ["eval/perplexity"]:
        return [Level(level.label.replace("ln V", "V"), math.exp(min(level.value, 60.0))) for level in levels]
    several_terms = any(name.startswith("train/loss/") for run in runs for line in run.training for name in line)
    return levels if group.title == LOSS and not several_terms else []


def _marks(run: RunRecord, xs: str) -> Iterator[Mark]:
    tokens = {line["step"]: line.get("tokens") for line in run.lines}
    for start in run.starts[1:]:
        yield from _mark("start", start.step, start.step if xs == "step" else tokens.get(start.step))
    for event in run.events:
        yield from _mark(str(event["event"]), event["step"], event.get(xs))


def _mark(kind: str, step: int, x: Any) -> Iterator[Mark]:
    if math.isfinite(place := _number(x)):
        yield Mark(kind if kind in ("start", "skip", "rollback", "diverged") else "event", place)


def _tokens_a_step(run: RunRecord) -> Iterator[float]:
    for before, after in zip(run.training, run.training[1:], strict=False):
        steps, tokens = after["step"] - before["step"], _number(after.get("tokens")) - _number(before.get("tokens"))
        if steps > 0 and math.isfinite(tokens):
            yield round(tokens / steps, 3)


def _number(value: Any) -> float:
    """Read a value of a file as a number; NaN for what is none, or none that can be drawn."""
    if type(value) not in (int, float) or not abs(value) < _LARGEST:
        return math.nan
    return float(value)
