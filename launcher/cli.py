"""The commands. Nothing heavy is imported before one runs, so that `--help` answers at once."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from launcher.bench_commands import bench_app
from launcher.command import (
    MOST_LOCAL_RANKS,
    MOST_RANKS,
    AsJson,
    Command,
    ConfigSource,
    Group,
    Overrides,
    RunFolder,
    TrainingCommand,
    console_of_results,
)
from launcher.console import make_console
from launcher.data_commands import data_app
from launcher.evaluate_command import evaluate
from launcher.look_commands import doctor, report, status
from launcher.plan_command import plan
from launcher.slurm_commands import submit
from launcher.text_commands import prepare, tokenizer_app
from trainer.runtime.plain_text import printable
from trainer.runtime.streams import use_consoles

app = typer.Typer(
    name="maskwright",
    cls=Group,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
checkpoint_app = typer.Typer(cls=Group, no_args_is_help=True, rich_markup_mode=None)
app.add_typer(tokenizer_app, name="tokenizer", help="Train a tokenizer.")
app.add_typer(data_app, name="data", help="Look at prepared data, verify it, or simulate a run over it.")
app.add_typer(bench_app, name="bench", help="Measure speed, side by side with others.")
app.add_typer(checkpoint_app, name="checkpoint", help="List the checkpoints of a run, or verify them.")


def _print_version(wanted: bool) -> None:
    if wanted:
        from trainer.runtime.versions import installed_version

        print(f"maskwright {installed_version('maskwright') or '(run from a folder, not installed)'}")
        raise typer.Exit


@app.callback(
    epilog="Start with `maskwright demo`. `maskwright COMMAND --help` explains a command and shows an example."
)
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Pre-train Hugging Face encoders on DeepSpeed ZeRO, from raw text to a save_pretrained folder."""


@app.command(cls=Command)
def demo(
    directory: Annotated[
        str | None, typer.Option("--dir", metavar="DIR", help="Where to work.", show_default="a new folder")
    ] = None,
) -> None:
    """Run the whole path on a small corpus, on CPU: about five minutes.

    Harvests English text from the documentation inside the installed Python packages, trains a tokenizer, prepares
    shards, trains a tiny RoBERTa on two ranks, interrupts and resumes it, converts it, and fills a few masks.

    \b
    Example:
      maskwright demo --dir demo
    """
    from tools.demo import run_demo

    run_demo(directory, make_console())


app.command(cls=Command)(prepare)
app.command(cls=Command)(plan)


@app.command(cls=Command)
def validate(
    config: ConfigSource,
    overrides: Overrides = None,
    process_count: Annotated[
        int,
        typer.Option(
            "--nproc-per-node", metavar="N", min=1, max=MOST_RANKS, help="Ranks to check the batch arithmetic for."
        ),
    ] = 1,
) -> None:
    """Check everything that can be checked without training; a mistake is named, and the exit code is 2.

    \b
    Example:
      maskwright validate my.yaml batch.micro_size=16 --nproc-per-node 8
    """
    from trainer.config.file import load_config

    loaded = load_config(config, overrides or ())
    from tools.validate import validate as validate_run

    for line in validate_run(loaded, process_count):
        print(printable(line))


LocalRanks = Annotated[
    int | None,
    typer.Option(
        "--nproc-per-node",
        metavar="N",
        min=1,
        max=MOST_LOCAL_RANKS,
        help="Ranks to start on this machine, one a GPU. Inside srun or torchrun, which start them, leave it out.",
        show_default="1",
    ),
]
NodeCount = Annotated[
    int | None,
    typer.Option(
        "--nnodes",
        metavar="K",
        min=1,
        max=MOST_RANKS,
        help="Machines, without SLURM: run the command on each of them.",
    ),
]
NodeRank = Annotated[
    int | None, typer.Option(metavar="I", min=0, help="Which of them this is, from 0.", show_default=False)
]
MasterAddress = Annotated[
    str | None, typer.Option("--master-addr", metavar="A", help="Node 0, as all of them reach it.")
]
MasterPort = Annotated[
    int | None,
    typer.Option(metavar="P", min=1, max=65535, help="A free port of node 0, the same on all.", show_default="29500"),
]
Resume = Annotated[
    str,
    typer.Option(
        metavar="auto|must|never|PATH",
        help="auto resumes if the run folder has a checkpoint; must refuses to start afresh; never refuses to "
        "resume; PATH is a checkpoint.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Do a step of each phase; save nothing.")]


@app.command(cls=TrainingCommand)
def train(
    config: ConfigSource,
    overrides: Overrides = None,
    process_count: LocalRanks = None,
    node_count: NodeCount = None,
    node_rank: NodeRank = None,
    master_address: MasterAddress = None,
    master_port: MasterPort = None,
    resume: Resume = "auto",
    dry_run: DryRun = False,
) -> int:
    """Train. The same command resumes a run that was stopped.

    USR1, TERM, HUP and Ctrl-C save a checkpoint at the next step and end with exit code 75; a second Ctrl-C stops at
    once.

    \b
    Examples:
      maskwright train my.yaml --nproc-per-node 8
      maskwright train my.yaml optimizer.lr=3e-4 run.dir=runs/lower --dry-run
      maskwright train my.yaml --nproc-per-node 8 --nnodes 2 --node-rank 0 --master-addr node0
      srun --ntasks-per-node 8 maskwright train roberta-base
    """
    from launcher.start import ProcessOptions, start_training

    options = ProcessOptions(process_count, node_count, node_rank, master_address, master_port)
    return start_training(config, overrides or [], resume, dry_run, options)


app.command(cls=Command)(submit)
app.command(cls=Command)(status)
app.command(cls=Command)(report)
app.command(cls=Command)(evaluate)
app.command(cls=Command)(doctor)


@checkpoint_app.command("list", cls=Command)
def checkpoint_list(run: RunFolder, as_json: AsJson = False) -> None:
    """List what can be resumed, and what cannot and why, by manifests and file sizes.

    \b
    Example:
      maskwright checkpoint list runs/my
    """
    from tools.checkpoints import list_run

    list_run(run, as_json, console_of_results(as_json))


@checkpoint_app.command("verify", cls=Command)
def checkpoint_verify(run: RunFolder, as_json: AsJson = False) -> None:
    """Check that every file of every checkpoint is whole; damage is named, and the exit code is 3.

    \b
    Example:
      maskwright checkpoint verify runs/my
    """
    from tools.checkpoints import verify_run

    verify_run(run, as_json, console_of_results(as_json))


@app.command(cls=Command)
def convert(
    source: Annotated[
        str, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="A run folder (its newest checkpoint) or a checkpoint.")
    ],
    output: Annotated[str, typer.Option(metavar="DIR", help="The model folder to write.")],
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Of the saved weights.")] = "float32",
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Largest weight file.")] = "5GB",
    code: Annotated[bool, typer.Option("--code", help="Run the model's own code (of a run with model.code).")] = False,
    best: Annotated[bool, typer.Option("--best", help="The run's best evaluation (checkpoint.keep_best).")] = False,
    average: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CHECKPOINT...",
            help="The mean of several: steps such as 500, `last:4` for the newest four, or paths.",
        ),
    ] = None,
) -> None:
    """Write a Hugging Face folder: safetensors, config, tokenizer and model card.

    Its logits are compared with the checkpoint's before success is reported.

    \b
    Example:
      maskwright convert runs/my --output my-model
      maskwright convert runs/my --average last:4 --output my-mean
    """
    from tools.convert import convert as convert_checkpoint

    convert_checkpoint(source, output, dtype, max_shard_size, make_console(), code, best, average or ())


def main() -> None:
    """Run the command of this process."""
    use_consoles()
    app(prog_name="maskwright")
