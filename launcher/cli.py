"""The commands. Nothing heavy is imported before one runs, so that `--help` answers at once."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from launcher.console import Card, exit_code, make_console, print_card
from trainer.errors import MaskwrightError

if TYPE_CHECKING:
    from rich.console import Console

_OPTIONS_OF_SEVERAL_VALUES = ("--input",)


class Command(TyperCommand):
    """Ends with the exit code that its function returns (None is 0); an expected error becomes a card."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, _repeat_option(args, _OPTIONS_OF_SEVERAL_VALUES))

    def invoke(self, ctx: Any) -> None:
        try:
            code = super().invoke(ctx)
        except MaskwrightError as error:
            print_card(Card.of(error))
            code = exit_code(error)
        except KeyboardInterrupt as error:
            print("Interrupted.", file=sys.stderr)
            code = exit_code(error)
        raise typer.Exit(code or 0)


def _repeat_option(args: list[str], names: tuple[str, ...]) -> list[str]:
    """`--input a b` → `--input a --input b`: what a shell makes of `--input *.txt`."""
    repeated: list[str] = []
    option = None
    for arg in args:
        if arg in names:
            option = arg
        elif arg.startswith("-"):
            option = None
            repeated.append(arg)
        else:
            repeated += [option, arg] if option else [arg]
    return repeated


app = typer.Typer(
    name="maskwright", add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None
)
tokenizer_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
data_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
checkpoint_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(tokenizer_app, name="tokenizer", help="Train a tokenizer.")
app.add_typer(data_app, name="data", help="Look at prepared data, or verify it.")
app.add_typer(checkpoint_app, name="checkpoint", help="List the checkpoints of a run, or verify them.")

Inputs = Annotated[
    list[str],
    typer.Option("--input", metavar="PATH...", help="Files, folders, globs, or compressed files (.gz .zst .xz .bz2)."),
]
ConfigSource = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A YAML file, or a recipe: demo, roberta-base, roberta-large.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", help="Config keys to override, such as batch.micro_size=4.", show_default=False
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"maskwright {version('maskwright')}")
        raise typer.Exit


def _console_of_results(as_json: bool) -> Console:
    """What these commands say is their result: on stdout, unless JSON has it."""
    return make_console(sys.stderr if as_json else sys.stdout)


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


@tokenizer_app.command("train", cls=Command)
def tokenizer_train(
    inputs: Inputs,
    output: Annotated[str, typer.Option("--output", metavar="DIR", help="The tokenizer folder to write.")],
    kind: Annotated[
        Literal["bytelevel-bpe", "wordpiece", "unigram"],
        typer.Option("--type", help="bytelevel-bpe as RoBERTa, wordpiece as BERT, unigram as XLM-RoBERTa."),
    ] = "bytelevel-bpe",
    vocabulary_size: Annotated[
        int, typer.Option("--vocab-size", metavar="N", min=1, help="Tokens, special ones included.")
    ] = 50_265,
) -> None:
    """Train a tokenizer on text; the folder loads with AutoTokenizer.from_pretrained.

    \b
    Example:
      maskwright tokenizer train --input texts/*.txt --output tokenizer --vocab-size 32000
    """
    from tools.tokenizer import train_tokenizer

    train_tokenizer(inputs, output, kind, vocabulary_size, make_console())


@app.command(cls=Command)
def prepare(
    inputs: Inputs,
    tokenizer: Annotated[str, typer.Option(metavar="DIR", help="The tokenizer folder.")],
    output: Annotated[str, typer.Option(metavar="DIR", help="The data folder to write.")],
    format: Annotated[
        Literal["auto", "text", "jsonl", "csv", "parquet", "arrow", "hub"],
        typer.Option(
            help="auto goes by the file name; with hub, PATH is the name of a dataset on the Hugging Face hub."
        ),
    ] = "auto",
    field: Annotated[str, typer.Option(help="The column that holds the text (all formats but text).")] = "text",
    documents: Annotated[
        Literal["file", "paragraph", "line", "row"] | None,
        typer.Option(help="What a document is.", show_default="paragraph for text, row for the other formats"),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Tokenizing processes.", show_default="one a core")
    ] = None,
    validation_fraction: Annotated[
        float,
        typer.Option(
            metavar="F",
            min=0.0,
            max=0.5,
            help="Share of the documents to hold out; writes DIR/train and DIR/validation.",
        ),
    ] = 0.0,
) -> None:
    """Tokenize text once into the shards that training reads.

    The bytes written are the same for any number of workers. A document goes to validation by its hash.

    \b
    Examples:
      maskwright prepare --input texts/ --tokenizer tokenizer --output data --validation-fraction 0.01
      maskwright prepare --input 'dump/*.jsonl.zst' --field body --tokenizer tokenizer --output data
    """
    from launcher.local import core_count
    from tools.prepare import prepare as prepare_shards

    prepare_shards(
        inputs=inputs,
        tokenizer=tokenizer,
        output=output,
        format=format,
        field=field,
        documents=documents,
        workers=workers or core_count(),
        validation_fraction=validation_fraction,
        console=make_console(),
    )


DataFolder = Annotated[str, typer.Argument(metavar="DIR", help="A folder that `maskwright prepare` wrote.")]


@data_app.command("show", cls=Command)
def data_show(folder: DataFolder, as_json: AsJson = False) -> None:
    """Show counts and sizes, and decode a few blocks as training will see them.

    \b
    Example:
      maskwright data show data/train
    """
    from tools.inspect import show

    show(folder, as_json, _console_of_results(as_json))


@data_app.command("verify", cls=Command)
def data_verify(folder: DataFolder, as_json: AsJson = False) -> None:
    """Check every checksum; a damaged file is named, and the exit code is 3.

    \b
    Example:
      maskwright data verify data/train
    """
    from tools.inspect import verify

    verify(folder, as_json, _console_of_results(as_json))


@app.command(cls=Command)
def validate(
    config: ConfigSource,
    overrides: Overrides = None,
    process_count: Annotated[
        int, typer.Option("--nproc-per-node", metavar="N", min=1, help="Ranks to check the batch arithmetic for.")
    ] = 1,
) -> None:
    """Check everything that can be checked without training; a mistake is named, and the exit code is 2.

    \b
    Example:
      maskwright validate my.yaml batch.micro_size=16 --nproc-per-node 8
    """
    from trainer.config import load_config

    loaded = load_config(config, overrides or ())
    from trainer.train import validate as validate_run

    for line in validate_run(loaded, process_count):
        print(line)


@app.command(cls=Command)
def train(
    config: ConfigSource,
    overrides: Overrides = None,
    process_count: Annotated[
        int | None,
        typer.Option(
            "--nproc-per-node",
            metavar="N",
            min=1,
            help="Ranks to start on this machine, one a GPU. Inside srun or torchrun, which start them, leave it out.",
            show_default="1",
        ),
    ] = None,
    resume: Annotated[
        str,
        typer.Option(
            metavar="auto|must|never|PATH",
            help="auto resumes if the run folder has a checkpoint; must refuses to start afresh; never refuses to "
            "resume; PATH is a checkpoint.",
        ),
    ] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Run one real step and save nothing.")] = False,
) -> int:
    """Train. The same command resumes a run that was stopped.

    USR1, TERM and Ctrl-C save a checkpoint at the next step and end with exit code 75; a second Ctrl-C stops at once.

    \b
    Examples:
      maskwright train my.yaml --nproc-per-node 8
      maskwright train my.yaml optimizer.lr=3e-4 run.dir=runs/lower --dry-run
      srun --ntasks-per-node 8 maskwright train roberta-base
    """
    from launcher.start import start_training

    return start_training(config, overrides or [], process_count, resume, dry_run)


RunFolder = Annotated[str, typer.Argument(metavar="RUN", help="A run folder (run.dir of its config).")]


@checkpoint_app.command("list", cls=Command)
def checkpoint_list(run: RunFolder, as_json: AsJson = False) -> None:
    """List what can be resumed.

    \b
    Example:
      maskwright checkpoint list runs/my
    """
    from tools.checkpoints import list_run

    list_run(run, as_json, _console_of_results(as_json))


@checkpoint_app.command("verify", cls=Command)
def checkpoint_verify(run: RunFolder, as_json: AsJson = False) -> None:
    """Check that every file of every checkpoint is whole; damage is named, and the exit code is 3.

    \b
    Example:
      maskwright checkpoint verify runs/my
    """
    from tools.checkpoints import verify_run

    verify_run(run, as_json, _console_of_results(as_json))


@app.command(cls=Command)
def convert(
    source: Annotated[
        str, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="A run folder (its newest checkpoint) or a checkpoint.")
    ],
    output: Annotated[str, typer.Option(metavar="DIR", help="The model folder to write.")],
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Of the saved weights.")] = "float32",
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Largest weight file.")] = "5GB",
) -> None:
    """Write a Hugging Face folder: safetensors, config, tokenizer and model card.

    Its logits are compared with the checkpoint's before success is reported.

    \b
    Example:
      maskwright convert runs/my --output my-model
    """
    from tools.convert import convert as convert_checkpoint

    convert_checkpoint(source, output, dtype, max_shard_size, make_console())


def main() -> None:
    """The console script."""
    app(prog_name="maskwright")
