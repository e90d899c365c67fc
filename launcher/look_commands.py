"""The commands that look at a run or at the machines: status, report, doctor."""

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


def report(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Run folders; several are drawn over each other.")
    ],
    output: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.html",
            help="The page to write.",
            show_default="report.html in the run's folder; of several runs, here",
        ),
    ] = None,
) -> None:
    """Write a page about a run: curves, evaluations, examples, starts and events, settings. It needs nothing else.

    Of several runs: their curves over each other, the settings that differ, and their last numbers. A run may be going
    on. A report that is there already is replaced; any other file is not.

    \b
    Examples:
      maskwright report runs/my
      maskwright report runs/my runs/lower --output compared.html
    """
    from tools.report.run import write_report

    write_report(runs, output, console_of_results(False))


def doctor(
    config: Annotated[
        str | None, typer.Argument(metavar="[CONFIG]", help="Also check its tokenizer, data and folders.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]", help="Config keys to override.", show_default=False)
    ] = None,
    job: Annotated[
        str | None,
        typer.Option(metavar="RUN", help="Inside `srun --ntasks-per-node=1`: check all nodes together, for this run."),
    ] = None,
    answer_seconds: Annotated[
        float, typer.Option(metavar="S", min=1.0, help="With --job: how long a node may take to answer.")
    ] = 180.0,
    as_json: AsJson = False,
) -> int:
    """Check this machine for training: versions, devices, compilers, disk, network, collectives.

    Each line is ok, warn or fail with its remedy, and can be pasted into an issue. The exit code is 2 with a fail. With
    --job one process on each node looks at it; bad nodes are named, and RUN/preflight.json is written.

    \b
    Examples:
      maskwright doctor my.yaml
      srun --ntasks-per-node=1 --kill-on-bad-exit=0 maskwright doctor --job runs/my
    """
    from launcher.doctor import examine_here, examine_in_job

    if job is not None:
        return examine_in_job(job, as_json, answer_seconds)
    return examine_here(config, overrides or [], as_json)
