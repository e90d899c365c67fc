"""The commands that measure speed: bench."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from launcher.command import AsJson, Command, write_result
from launcher.console import make_console

bench_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

Rounds = Annotated[int, typer.Option(metavar="N", min=1, help="Turns of each variant.")]


@bench_app.command("loader", cls=Command)
def bench_loader(
    data: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="A folder that `maskwright prepare` wrote.", show_default="random tokens"),
    ] = None,
    size: Annotated[int, typer.Option(metavar="MB", min=1, help="How much random data to write.")] = 256,
    seq_len: Annotated[int, typer.Option(metavar="N", min=8, max=32768, help="Tokens a block.")] = 512,
    micro_size: Annotated[int, typer.Option(metavar="N", min=1, help="Sequences a batch.")] = 32,
    against: Annotated[
        Literal["all", "hf", "mds", "none"],
        typer.Option(help="Hugging Face, mosaicml-streaming, all that is installed, or none."),
    ] = "all",
    rounds: Rounds = 5,
    seconds: Annotated[float, typer.Option(metavar="S", min=0.01, help="Of each turn.")] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Measure the loader on one core: order, gather, masks and end to end, beside other loaders.

    Tokens a second of CPU time and by the clock; the variants take turns in one process, so that ratios hold on a
    busy machine too.

    \b
    Examples:
      maskwright bench loader
      maskwright bench loader --data data/train --against hf --json
    """
    from tools.bench.loader import LoaderBenchmark
    from tools.bench.loader import bench_loader as measure

    settings = LoaderBenchmark(data, size, seq_len, micro_size, against, rounds, seconds)
    write_result(measure(settings, make_console()), as_json)


@bench_app.command("prepare", cls=Command)
def bench_prepare(
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            metavar="PATH...",
            help="Text, as `maskwright prepare` takes it.",
            show_default="documentation of the installed packages",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="DIR", help="The tokenizer folder.", show_default="trained on the text")
    ] = None,
    size: Annotated[int, typer.Option(metavar="MB", min=4, help="How much text, when none is given.")] = 32,
    against: Annotated[Literal["hf", "none"], typer.Option(help="Hugging Face datasets, or none.")] = "hf",
    rounds: Rounds = 3,
    as_json: AsJson = False,
) -> None:
    """Measure prepare with one and two workers, beside datasets.map with group_texts and the bare tokenizer.

    Tokens a second of CPU time and by the clock; each turn has a process of its own. Takes about five minutes.

    \b
    Examples:
      maskwright bench prepare
      maskwright bench prepare --input texts/ --tokenizer tokenizer --json
    """
    from tools.bench.prepare import PrepareBenchmark
    from tools.bench.prepare import bench_prepare as measure

    settings = PrepareBenchmark(tuple(inputs or ()), tokenizer, size, against, rounds)
    write_result(measure(settings, make_console()), as_json)
