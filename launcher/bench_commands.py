"""The commands that measure speed: bench."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from launcher.command import MOST_LOCAL_RANKS, AsJson, Command, Group, write_result
from launcher.console import make_console

bench_app = typer.Typer(cls=Group, no_args_is_help=True, rich_markup_mode=None)

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
    scheme: Annotated[
        Literal["token", "word", "ngram", "span"],
        typer.Option(help="What is masked as a whole; words also beside single tokens, and Hugging Face's words."),
    ] = "token",
    as_json: AsJson = False,
) -> None:
    """Measure the loader on one core: order, gather, masks and end to end, beside other loaders.

    Tokens a second of CPU time and by the clock; the variants take turns in one process, so that ratios hold on a
    busy machine too.

    \b
    Examples:
      maskwright bench loader
      maskwright bench loader --data data/train --against hf --json
      maskwright bench loader --scheme span
    """
    from tools.bench.loader import bench_loader as measure
    from tools.bench.loader_work import LoaderBenchmark

    settings = LoaderBenchmark(data, size, seq_len, micro_size, against, rounds, seconds, scheme)
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


Against = Annotated[
    Literal["hf", "ladder", "all"],
    typer.Option(
        help="What maskwright is measured beside: Hugging Face Trainer and the plain loop with the same head; "
        "a plain loop that becomes ours rung by rung; or all variants."
    ),
]
Variants = Annotated[
    str | None,
    typer.Option(metavar="A,B,...", help="These variants only; a wrong name lists them.", show_default="--against"),
]
Model = Annotated[
    str,
    typer.Option(metavar="NAME|PATH", help="small (H 256, L 4, vocabulary 50,265), a preset, or a config.json."),
]
MicroSize = Annotated[int, typer.Option("--micro", metavar="N", min=1, help="Sequences a rank and step.")]
SeqLen = Annotated[int, typer.Option(metavar="N", min=8, max=32768, help="Tokens a sequence.")]
Ranks = Annotated[
    int, typer.Option(metavar="N", min=1, max=MOST_LOCAL_RANKS, help="Processes of each variant, on this machine.")
]
Precision = Annotated[
    Literal["fp32", "bf16"] | None, typer.Option(help="Of forward and backward.", show_default="bf16 on CUDA")
]
Threads = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Of torch, a rank.", show_default="cores / ranks")
]
Steps = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Timed steps a turn.", show_default="8; 50 on GPUs; 50 or 1,000 for losses"),
]
StepRounds = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Turns of each variant.", show_default="3; 1 for losses")
]
Data = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="A folder that `maskwright prepare` wrote.", show_default="drawn tokens"),
]
CheckLosses = Annotated[
    bool, typer.Option("--check-losses", help="Dropout 0: the losses of all variants must be equal to 1e-4.")
]
TimeToLoss = Annotated[
    float | None, typer.Option(metavar="LOSS", min=0.0, help="Measure the seconds to this validation loss.")
]
Markdown = Annotated[str | None, typer.Option(metavar="FILE", help="Write tables and profiles there.")]
Chart = Annotated[str | None, typer.Option(metavar="FILE.png", help="Draw a bar chart there.")]


@bench_app.command("step", cls=Command)
def bench_step(
    against: Against = "hf",
    variants: Variants = None,
    model: Model = "small",
    micro_size: MicroSize = 8,
    seq_len: SeqLen = 512,
    ranks: Ranks = 1,
    precision: Precision = None,
    threads: Threads = None,
    steps: Steps = None,
    rounds: StepRounds = None,
    data: Data = None,
    check_losses: CheckLosses = False,
    time_to_loss: TimeToLoss = None,
    markdown: Markdown = None,
    chart: Chart = None,
    as_json: AsJson = False,
) -> None:
    """Measure the training step beside Hugging Face Trainer and plain torch loops: same model, masks, optimizer.

    Each variant has processes of its own and they take turns; tokens/s, the parts of a step, MFU, peak memory.

    \b
    Examples:
      maskwright bench step --against hf --json
      maskwright bench step --model roberta-base --micro 64 --against all --chart step.png
      maskwright bench step --check-losses --micro 2 --seq-len 128
      maskwright bench step --variants hf,ours-fast --time-to-loss 8.5
    """
    from tools.bench.step import StepBenchmark, default_precision, default_steps, members, require_equal_losses
    from tools.bench.step import bench_step as measure
    from tools.bench.step_work import StepWork

    usual, warmup = default_steps()
    if time_to_loss is not None or check_losses:
        usual, warmup = 1000 if time_to_loss is not None else 50, 0
    work = StepWork(
        model=model,
        micro_size=micro_size,
        seq_len=seq_len,
        ranks=ranks,
        precision=precision or default_precision(),
        steps=steps or usual,
        warmup_steps=warmup,
        data=data,
        target_loss=time_to_loss,
    )
    console = make_console()
    settings = StepBenchmark(
        variants=tuple(variants.split(",")) if variants else members(against, console),
        work=work,
        rounds=rounds or (1 if check_losses else 3),
        threads=threads,
        check_losses=check_losses,
        chart=chart,
        markdown=markdown,
    )
    write_result(report := measure(settings, console), as_json)
    if check_losses:
        require_equal_losses(report)


@bench_app.command("recipe", cls=Command)
def bench_recipe(
    configs: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG... [KEY=VALUE...]",
            help="Recipes or config files, and config keys to override in all of them.",
        ),
    ],
    to_loss: Annotated[
        float | None,
        typer.Option(metavar="LOSS", min=0.0, help="Held-out loss to reach.", show_default="train to the end"),
    ] = None,
    seeds: Annotated[str, typer.Option(metavar="A,B,...", help="Each arm is trained once for each.")] = "0",
    against: Annotated[
        Literal["defaults", "tuned", "both", "none"],
        typer.Option(
            help="Hugging Face Trainer with its own defaults, with the first recipe's numbers, both, or none."
        ),
    ] = "both",
    every_steps: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Between two evaluations.", show_default="a twentieth of the run"),
    ] = None,
    folder: Annotated[
        str | None,
        typer.Option("--dir", metavar="DIR", help="A new folder in which the runs stay.", show_default="none stay"),
    ] = None,
    markdown: Annotated[str | None, typer.Option(metavar="FILE", help="Write the table there.")] = None,
    chart: Annotated[str | None, typer.Option(metavar="FILE.png", help="Draw the curves of loss there.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure seconds and tokens to a held-out loss: whole recipes beside each other and beside Hugging Face Trainer.

    All have the same first weights and text, and as many tokens before them. One process each, on this machine.

    \b
    Examples:
      maskwright bench recipe mine.yaml --to-loss 5.2 --seeds 0,1,2
      maskwright bench recipe adamw.yaml muon.yaml train.steps=600 --against none --chart curves.png
    """
    from tools.bench.recipe import RecipeBenchmark
    from tools.bench.recipe import bench_recipe as measure

    overrides = tuple(each for each in configs if "=" in each)
    names = tuple(each for each in configs if "=" not in each)
    settings = RecipeBenchmark(names, overrides, to_loss, _seeds(seeds), against, every_steps, folder, chart, markdown)
    write_result(measure(settings, make_console()), as_json)


def _seeds(text: str) -> tuple[int, ...]:
    """Read `0,1,2`."""
    numbers = text.split(",")
    if not all(number.isdecimal() and int(number) < 2**63 for number in numbers) or len({*numbers}) < len(numbers):
        raise typer.BadParameter(f"'{text}' is no list of different whole numbers such as 0,1,2.", param_hint="--seeds")
    return tuple(map(int, numbers))
