"""The page: its template, filled in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tools.report import facts
from tools.report.chart import DASHES, LEVEL_DASHES, MARK_COLOURS, MARK_DASHES, draw
from tools.report.gather import RunRecord
from tools.report.panels import COLOURS, Panel, make_panels
from trainer.runtime.plain_text import printable

_HAPPENED = {
    "start": "a restart",
    "skip": "a skipped step",
    "rollback": "a rollback",
    "diverged": "training diverged",
    "event": "another event",
}


def render(runs: Sequence[RunRecord], marker: str) -> str:
    """Write the page of one run, or of several over each other.

    Everything that comes from a file is escaped by the template; control characters are shown as escapes.

    Args:
        marker: an element for the head, by which the page is known.
    """
    environment = Environment(
        loader=PackageLoader("tools.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.filters.update(visible=facts.visible)
    panels = make_panels(list(runs))
    return environment.get_template("page.html").render(
        runs=runs,
        facts=facts,
        marker=Markup(marker),
        charts=[(panel, Markup(draw(panel, f"c{number}")), describe(panel)) for number, panel in enumerate(panels)],
        first=Markup(draw(panels[0], "wide", wide=True)) if panels else "",
        dash=_dash,
        colours=COLOURS,
        marks=[
            (MARK_COLOURS[kind], _dash(MARK_DASHES[kind]), what)
            for kind, what in _HAPPENED.items()
            if any(mark.kind == kind for panel in panels for mark in panel.marks)
        ],
        dashes=DASHES,
        level_dashes=LEVEL_DASHES,
    )


def describe(panel: Panel) -> str:
    """Say what a chart shows, for those who do not see it."""
    told = []
    for curve in panel.curves:
        ys = curve.ys[np.isfinite(curve.ys)]
        told.append(f"{curve.label} from {ys[0]:.4g} to {ys[-1]:.4g}, lowest {ys.min():.4g}, highest {ys.max():.4g}")
    told += [f"{level.label}: {level.value:.4g}" for level in panel.levels]
    return f"{panel.title} over {panel.xs}s. ".replace("tokenss", "tokens") + "; ".join(told)


def _dash(pattern: Sequence[float]) -> str:
    """Write dashes for a line that is as wide as that of a chart."""
    return " ".join(f"{1.4 * each:g}" for each in pattern) or "none"
