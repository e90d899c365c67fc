"""The command that queues a run on a cluster: submit."""

from __future__ import annotations

from typing import Annotated

import typer

from launcher.command import MOST_LOCAL_RANKS, MOST_RANKS
from launcher.console import make_console

Text = str | None


def submit(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG", help="A YAML file, or a recipe: demo, roberta-base, roberta-base-fast, roberta-large."
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Config keys to override, such as batch.micro_size=4. Behind `--`: any more options of sbatch.",
            show_default=False,
        ),
    ] = None,
    nodes: Annotated[int, typer.Option(metavar="N", min=1, max=MOST_RANKS)] = 1,
    gpus_per_node: Annotated[Text, typer.Option(metavar="G", help="One rank each; TYPE:G where types differ.")] = None,
    tasks_per_node: Annotated[
        int | None, typer.Option(metavar="R", min=1, max=MOST_LOCAL_RANKS, help="Ranks a node, on nodes without GPUs.")
    ] = None,
    cpus_per_task: Annotated[
        int | None, typer.Option(metavar="C", min=1, max=65_536, help="Cores a rank.", show_default="1 + data.workers")
    ] = None,
    time: Annotated[Text, typer.Option(metavar="T", help="Time limit of each start, such as 24:00:00.")] = None,
    partition: Annotated[Text, typer.Option(metavar="NAME")] = None,
    account: Annotated[Text, typer.Option(metavar="NAME")] = None,
    qos: Annotated[Text, typer.Option(metavar="NAME")] = None,
    constraint: Annotated[Text, typer.Option(metavar="LIST", help="Features that nodes must have.")] = None,
    exclude: Annotated[Text, typer.Option(metavar="NODES", help="Nodes to stay away from.")] = None,
    mail_type: Annotated[Text, typer.Option(metavar="LIST", help="Such as END,FAIL.")] = None,
    mail_user: Annotated[Text, typer.Option(metavar="ADDRESS")] = None,
    site: Annotated[
        Text,
        typer.Option(
            metavar="FILE",
            help="How jobs run on this cluster; see slurm/site.example.yaml.",
            show_default="$MASKWRIGHT_SITE, else slurm/site.yaml if it exists",
        ),
    ] = None,
    chain: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            max=1000,
            help="Queue N jobs that go on one after the other, where jobs must not be requeued.",
        ),
    ] = 1,
    convert: Annotated[
        bool, typer.Option("--convert", help="Also queue a job that converts the finished run to RUN/model.")
    ] = False,
    preflight: Annotated[bool, typer.Option("--preflight", help="Look at every node before each start.")] = False,
    exclude_bad_nodes: Annotated[
        bool, typer.Option("--exclude-bad-nodes", help="The same, and go on without the nodes that are bad.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the job script, and neither write nor submit.")] = (
        False
    ),
) -> None:
    """Queue a run on SLURM; signalled, preempted or bereft of a node, it goes on by itself.

    Config and batch arithmetic are checked first. The job script and the resolved config are written to RUN/slurm.

    \b
    Examples:
      maskwright submit my.yaml --nodes 2 --gpus-per-node 8 --time 24:00:00 --partition gpu
      maskwright submit my.yaml optimizer.lr=3e-4 --gpus-per-node 8 --chain 5 --convert -- --mem=0 --exclusive
      maskwright submit my.yaml --nodes 4 --tasks-per-node 2 --cpus-per-task 16 --dry-run
    """
    from launcher.submit import Submission
    from launcher.submit import submit as submit_run

    words = overrides or []
    first_option = next((index for index, word in enumerate(words) if word.startswith("-")), len(words))
    options = {
        "cpus-per-task": cpus_per_task,
        "time": time,
        "partition": partition,
        "account": account,
        "qos": qos,
        "constraint": constraint,
        "exclude": exclude,
        "mail-type": mail_type,
        "mail-user": mail_user,
    }
    submit_run(
        Submission(
            config=config,
            overrides=words[:first_option],
            nodes=nodes,
            gpus_per_node=gpus_per_node,
            tasks_per_node=tasks_per_node,
            sbatch=options,
            more_sbatch=words[first_option:],
            site=site,
            chain=chain,
            convert=convert,
            preflight=preflight,
            exclude_bad_nodes=exclude_bad_nodes,
            dry_run=dry_run,
        ),
        make_console(),
    )
