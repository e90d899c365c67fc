"""The commands that look at a run or at the machines: status."""

from __future__ import annotations

from typing import Annotated

import typer

from launcher.command import AsJson, RunFolder, console_of_results


def status(
    run: RunFolder,
    watch: Annotated[bool, typer.Option("--watch", help="Go on until the run has ended.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show where a run stands: state, step, time left, loss, last checkpoint, nodes, and whether it is alive.

    From files in the run folder; a run that another machine trains can be looked at as well.

    \b
    Example:
      maskwright status runs/my --watch
    """
    from tools.status import show_status

    show_status(run, watch, as_json, console_of_results(as_json))
