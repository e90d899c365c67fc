"""Charts as SVG, to stand in a page: drawn by matplotlib, coloured by the page.

No text of a file is in a chart: names stand in the legends, which the page writes. Text stays text, so that it can be
read out, searched and printed; ids are left out, because several charts share a page. The same panel gives the same
bytes.
"""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import (
    EngFormatter,
    LogLocator,
    MaxNLocator,
    NullLocator,
    PercentFormatter,
    ScalarFormatter,
)

from tools.report.panels import COLOURS, Mark, Panel

DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.5, 1.5), (6, 2, 1.5, 2))
LEVEL_DASHES: tuple[tuple[float, ...], ...] = ((2, 3), (7, 3))
MARK_DASHES: dict[str, tuple[float, ...]] = {
    "start": (1, 3),
    "skip": (1, 1),
    "rollback": (4, 2),
    "diverged": (),
    "event": (3, 3),
}
MARK_COLOURS = {"start": "soft", "skip": "s4", "rollback": "s1", "diverged": "s1", "event": "ink"}
_SIZE = 4.6, 2.7  # inches: a chart has about these on a phone, and in a row of three on a screen
_WIDE_SIZE = 9.6, 6.5  # of two columns and two rows there
_LEAST_SPAN = 3.0  # highest over lowest value: below, a logarithmic axis has next to no ticks
# What matplotlib draws in these colours is drawn in those of the page, which differ by light and dark.
_STAND_INS = {f"s{number}": f"#f0000{number}" for number in range(COLOURS)} | {
    "ink": "#f000a0",
    "soft": "#f000b0",
    "grid": "#f000c0",
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "maskwright",
    "font.size": 9,
    "font.family": ["DejaVu Sans"],
    "axes.edgecolor": _STAND_INS["ink"],
    "axes.labelcolor": _STAND_INS["ink"],
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _STAND_INS["ink"],
    "ytick.color": _STAND_INS["ink"],
    "text.color": _STAND_INS["ink"],
    "grid.color": _STAND_INS["grid"],
    "grid.linewidth": 0.5,
    "path.simplify": True,
    "axes.formatter.use_mathtext": False,
}


def draw(panel: Panel, name: str, wide: bool = False) -> str:
    """Draw a chart: an `<svg>` that fills the width it is given.

    Args:
        name: of the chart on the page, for the few ids that it cannot do without.
    """
    with rc_context(_STYLE):
        figure = Figure(figsize=_WIDE_SIZE if wide else _SIZE, layout="constrained")
        figure.patch.set_alpha(0.0)
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        axes.patch.set_alpha(0.0)
        axes.grid(True, axis="y")
        _plot(axes, panel)
        _label(axes, panel)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _for_page(stream.getvalue(), name)


def _plot(axes: Axes, panel: Panel) -> None:
    if _is_log(panel):
        axes.set_yscale("log")
    for mark in panel.marks:
        _draw_mark(axes, mark)
    for number, level in enumerate(panel.levels):
        axes.axhline(level.value, color=_STAND_INS["ink"], linewidth=1, dashes=LEVEL_DASHES[number % 2])
    for curve in panel.curves:
        colour, dashes = _STAND_INS[f"s{curve.colour % COLOURS}"], DASHES[curve.dash % len(DASHES)]
        if curve.faint is not None:
            axes.plot(curve.xs, curve.faint, color=colour, linewidth=0.5, alpha=0.35)
        marker = "o" if curve.dots or np.isfinite(curve.ys).sum() == 1 else ""
        (line,) = axes.plot(curve.xs, curve.ys, color=colour, linewidth=1.4, marker=marker, markersize=3)
        if dashes:
            line.set_dashes(dashes)


def _is_log(panel: Panel) -> bool:
    values = [level.value for level in panel.levels]
    values += [float(value) for curve in panel.curves for value in curve.ys[np.isfinite(curve.ys)]]
    return panel.log and max(values) > _LEAST_SPAN * min(values)


def _draw_mark(axes: Axes, mark: Mark) -> None:
    line = axes.axvline(mark.x, color=_STAND_INS[MARK_COLOURS[mark.kind]], linewidth=0.9)
    if dashes := MARK_DASHES[mark.kind]:
        line.set_dashes(dashes)


def _label(axes: Axes, panel: Panel) -> None:
    axes.set_xlabel(panel.xs)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if panel.unit and panel.unit != "share":
        axes.set_ylabel(panel.unit)
    if panel.unit == "share":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    elif _is_log(panel):
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
        axes.yaxis.set_major_formatter(_short)
        axes.yaxis.set_minor_locator(NullLocator())
    elif max((float(np.nanmax(np.abs(curve.ys))) for curve in panel.curves), default=0.0) >= 10_000:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    else:
        formatter = ScalarFormatter(useOffset=False)
        formatter.set_powerlimits((-3, 4))
        axes.yaxis.set_major_formatter(formatter)


def _short(value: float, _position: float = 0) -> str:
    """Write 20000 as 20k; below 1 there are no letters that a reader would know."""
    return f"{value:g}" if value < 1 else EngFormatter(sep="")(value)


def _for_page(svg: str, name: str) -> str:
    """Make a file's SVG one of a page: no head, no size of its own, no ids, and the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</defs>", "", svg, flags=re.DOTALL)
    box = re.search(r'viewBox="([^"]*)"', svg)
    assert box is not None, "matplotlib gives one"
    svg = re.sub(r"<svg[^>]*>", f'<svg viewBox="{box[1]}" role="presentation" aria-hidden="true">', svg, count=1)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font(-family)?: [^;\"]*(?=[;\"])", _font_size, svg)
    for name, stand_in in _STAND_INS.items():
        svg = svg.replace(stand_in, f"var(--{name})")
    return svg.strip()


def _font_size(match: re.Match[str]) -> str:
    """Leave the family to the page."""
    size = re.search(r"[\d.]+px", match[0])
    return f"font-size: {size[0]}" if size else "font-family: inherit"
