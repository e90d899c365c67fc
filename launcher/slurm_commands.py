"""The command that queues a run on a cluster: submit."""

from __future__ import annotations

from typing import Annotated

import typer

from launcher.command import MOST_LOCAL_RANKS, MOST_RANKS, ConfigSource
from launcher.console import make_console

Text = str | None


OverridesAndSbatch = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Config keys to override, such as batch.micro_size=4. Behind `--`: any more options of sbatch.",
        show_default=False,
    ),
]
Nodes = Annotated[int, typer.Option(metavar="N", min=1, max=MOST_RANKS)]
GpusPerNode = Annotated[Text, typer.Option(metavar="G", help="One rank each; TYPE:G where types differ.")]
TasksPerNode = Annotated[
    int | None, typer.Option(metavar="R", min=1, max=MOST_LOCAL_RANKS, help="Ranks a node, on nodes without GPUs.")
]
CpusPerTask = Annotated[
    int | None, typer.Option(metavar="C", min=1, max=65_536, help="Cores a rank.", show_default="1 + data.workers")
]
TimeLimit = Annotated[Text, typer.Option(metavar="T", help="Time limit of each start, such as 24:00:00.")]
Name = Annotated[Text, typer.Option(metavar="NAME")]
Constraint = Annotated[Text, typer.Option(metavar="LIST", help="Features that nodes must have.")]
Exclude = Annotated[Text, typer.Option(metavar="NODES", help="Nodes to stay away from.")]
MailType = Annotated[Text, typer.Option(metavar="LIST", help="Such as END,FAIL.")]
MailUser = Annotated[Text, typer.Option(metavar="ADDRESS")]
Site = Annotated[
    Text,
    typer.Option(
        metavar="FILE",
        help="How jobs run on this cluster; see slurm/site.example.yaml.",
        show_default="$MASKWRIGHT_SITE, else slurm/site.yaml if it exists",
    ),
]
Chain = Annotated[
    int,
    typer.Option(
        metavar="N",
        min=1,
        max=1000,
        help="Queue N jobs that go on one after the other, where jobs must not be requeued.",
    ),
]
AndConvert = Annotated[
    bool, typer.Option("--convert", help="Also queue a job that converts the finished run to RUN/model.")
]
AndConvertBest = Annotated[
    bool,
    typer.Option(
        "--convert-best", help="The same with the best evaluation (checkpoint.keep_best) of the finished run."
    ),
]
Preflight = Annotated[bool, typer.Option("--preflight", help="Look at every node before each start.")]
ExcludeBadNodes = Annotated[
    bool, typer.Option("--exclude-bad-nodes", help="The same, and go on without the nodes that are bad.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the job script, and neither write nor submit.")]


def submit(
    config: ConfigSource,
    overrides: OverridesAndSbatch = None,
    nodes: Nodes = 1,
    gpus_per_node: GpusPerNode = None,
    tasks_per_node: TasksPerNode = None,
    cpus_per_task: CpusPerTask = None,
    time: TimeLimit = None,
    partition: Name = None,
    account: Name = None,
    qos: Name = None,
    constraint: Constraint = None,
    exclude: Exclude = None,
    mail_type: MailType = None,
    mail_user: MailUser = None,
    site: Site = None,
    chain: Chain = 1,
    convert: AndConvert = False,
    convert_best: AndConvertBest = False,
    preflight: Preflight = False,
    exclude_bad_nodes: ExcludeBadNodes = False,
    dry_run: DryRun = False,
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

    overrides, more_sbatch = _split_at_options(overrides or [])
    sbatch = {"cpus-per-task": cpus_per_task, "time": time, "partition": partition, "account": account, "qos": qos}
    sbatch |= {"constraint": constraint, "exclude": exclude, "mail-type": mail_type, "mail-user": mail_user}
    submit_run(
        Submission(
            config=config,
            overrides=overrides,
            nodes=nodes,
            gpus_per_node=gpus_per_node,
            tasks_per_node=tasks_per_node,
            sbatch=sbatch,
            more_sbatch=more_sbatch,
            site=site,
            chain=chain,
            convert=convert or convert_best,
            convert_best=convert_best,
            preflight=preflight,
            exclude_bad_nodes=exclude_bad_nodes,
            dry_run=dry_run,
        ),
        make_console(),
    )


def _split_at_options(words: list[str]) -> tuple[list[str], list[str]]:
    """Split what stands behind the config into its overrides, and the options of sbatch behind them."""
    first_option = next((index for index, word in enumerate(words) if word.startswith("-")), len(words))
    return words[:first_option], words[first_option:]
