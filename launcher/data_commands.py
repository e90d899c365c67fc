"""The commands that take tokens in, and look at data: data import, show, verify and simulate."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from launcher.command import AsJson, Command, Group, console_of_results, parse_count, write_result
from launcher.console import make_console
from launcher.text_commands import Delimiter, Format, OnBadDocument, TextField, Workers
from trainer.errors import EXIT_FINISHED, EXIT_UNEXPECTED, UserError

data_app = typer.Typer(cls=Group, no_args_is_help=True, rich_markup_mode=None)

MOST_SAMPLES = 10_000

TokenFiles = Annotated[
    list[str],
    typer.Option("--input", metavar="PATH...", help="Token files, prefixes of them, globs, or folders."),
]
TokenizerOfTokens = Annotated[str, typer.Option(metavar="DIR", help="The tokenizer that the tokens are of.")]
StoredFormat = Annotated[
    Literal["auto", "megatron", "datatrove", "datasets"],
    typer.Option("--from", help="megatron: .bin and .idx; datatrove: .ds; datasets: a folder of save_to_disk."),
]
IdsField = Annotated[str, typer.Option(help="The column of ids (datasets).")]
HeldOut = Annotated[
    float,
    typer.Option(
        metavar="F",
        min=0.0,
        max=0.5,
        help="Share of the documents to hold out, by the hash of their ids; writes DIR/train and DIR/validation.",
    ),
]
Link = Annotated[
    bool | None,
    typer.Option(
        "--link/--no-link",
        help="--link never copies: where a hard link cannot be made it makes a symbolic one, and what would have "
        "to be converted is refused. --no-link always copies.",
        show_default="hard links where they can be made, else conversion",
    ),
]
Strip = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TOKEN",
        help="A token to take off the ends of documents, besides the tokenizer's begin, end and pad tokens. "
        "May be given several times.",
        show_default=False,
    ),
]
SpecialInside = Annotated[
    Literal["refuse", "skip"],
    typer.Option(help="What to do with a document that holds a special token inside: end, or leave it out."),
]


@data_app.command("import", cls=Command)
def data_import(
    inputs: TokenFiles,
    tokenizer: TokenizerOfTokens,
    output: Annotated[str, typer.Option(metavar="DIR", help="The data folder to write.")],
    source_format: StoredFormat = "auto",
    field: IdsField = "input_ids",
    validation_fraction: HeldOut = 0.0,
    link: Link = None,
    strip: Strip = None,
    special_inside: SpecialInside = "refuse",
) -> None:
    """Use tokens that Megatron-LM, datatrove or the library datasets stored, without tokenizing again.

    A token file that holds just what a shard would is linked (a change of it would then change the data set, which
    `data verify` finds); any other is converted. Special tokens at the ends of a document are taken off, and one
    separator ends it. Every id is checked.

    
    Examples:
      maskwright data import --input corpus_text_document.idx --tokenizer tokenizer --output data
      maskwright data import --input 'tokens/*.ds' --tokenizer tokenizer --output data --validation-fraction 0.01
      maskwright data import --input saved/train --field input_ids --tokenizer tokenizer --output data
    """
    from tools.import_tokens import import_tokens

    import_tokens(
        inputs=inputs,
        tokenizer=tokenizer,
        output=output,
        format=source_format,
        field=field,
        validation_fraction=validation_fraction,
        link=link,
        strip=strip or (),
        special_inside=special_inside,
        console=make_console(),
    )


@data_app.command("select", cls=Command)
def data_select(
    inputs: Annotated[
        list[str], typer.Option("--from", metavar="PATH...", help="The large corpus: files, folders, globs.")
    ],
    like: Annotated[list[str], typer.Option(metavar="PATH...", help="The small text that it is to be like.")],
    output: Annotated[str, typer.Option(metavar="DIR", help="The folder of JSON lines to write.")],
    share: Annotated[
        float | None,
        typer.Option(metavar="F", min=1e-9, max=1.0, help="Share of the documents to choose.", show_default=False),
    ] = None,
    document_count: Annotated[
        int | None, typer.Option("--documents", metavar="N", min=1, help="Or how many.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw.")] = 0,
    workers: Workers = None,
    format: Format = "auto",
    field: TextField = "text",
    delimiter: Delimiter = None,
    on_bad_document: OnBadDocument = "stop",
    as_json: AsJson = False,
) -> None:
    """Choose the documents of a large corpus that resemble a small one, for training on a domain.

    By hashed n-gram importance (DSIR, arXiv:2302.03169): documents whose words and pairs of words are likelier in
    --like than in --from. The corpus is read three times, by all cores.

    \b
    Examples:
      maskwright data select --from general/ --like task.txt --share 0.05 --output chosen
      maskwright data select --from 'web/*.jsonl.zst' --field body --like papers/ --documents 1000000 --output chosen
    """
    from tools.select.run import Selection, select_documents
    from tools.training_text import ReadOptions

    reading = ReadOptions(format, field, None, delimiter, on_bad_document)
    selection = Selection(share, document_count, seed)
    report = select_documents(inputs, like, output, selection, make_console(), workers=workers, reading=reading)
    write_result(report, as_json)


DataFolder = Annotated[str, typer.Argument(metavar="DIR", help="A folder that `maskwright prepare` wrote.")]


@data_app.command("show", cls=Command)
def data_show(
    source: Annotated[
        str,
        typer.Argument(metavar="DIR_OR_CONFIG", help="A folder that `maskwright prepare` wrote, a config or a recipe."),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Config keys to override.", show_default=False),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, max=MOST_SAMPLES, help="Of a config: how many samples.", show_default="3")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what is in prepared data, or what training would see of it.

    Of a folder: counts and sizes, and a few blocks decoded. Of a config: the first samples of its run, each as the text
    and as what the model is shown in its place.

    \b
    Examples:
      maskwright data show data/train
      maskwright data show my.yaml objective.scheme=word --samples 10
    """
    from tools.inspect import holds_data, show
    from trainer.config.file import load_config, names_config

    console = console_of_results(as_json)
    if names_config(source) and not holds_data(source):
        from tools.show_samples import show_samples

        show_samples(load_config(source, overrides or ()), samples or 3, as_json, console)
        return
    if given := [*(overrides or ()), *(["--samples"] if samples else ())]:
        raise UserError(
            f"'{source}' is no config, and '{given[0]}' is for one.",
            where=given[0],
            remedy="Leave it out, or give a config or recipe.",
        )
    show(source, as_json, console)


@data_app.command("verify", cls=Command)
def data_verify(folder: DataFolder, as_json: AsJson = False) -> None:
    """Check every checksum; a damaged file is named, and the exit code is 3.

    \b
    Example:
      maskwright data verify data/train
    """
    from tools.inspect import verify

    verify(folder, as_json, console_of_results(as_json))


def _count(help: str, default: str, *names: str) -> Any:
    """Make an option that takes a whole number such as 8192, 1.5G or 10T."""
    return typer.Option(*names, parser=parse_count, metavar="N", help=help, show_default=default)


@data_app.command("simulate", cls=Command)
def data_simulate(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="CONFIG_OR_DIR",
            help="A config or recipe, or a folder that `maskwright prepare` wrote; only manifests are read.",
            show_default="data on paper",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Config keys to override.", show_default=False),
    ] = None,
    tokens: Annotated[int | None, _count("On paper: tokens, such as 10T.", "10T")] = None,
    shards: Annotated[int | None, _count("On paper: shards.", "20000")] = None,
    vocabulary_size: Annotated[int | None, _count("On paper: ids.", "50265", "--vocab-size")] = None,
    seq_len: Annotated[int | None, _count("Tokens a block.", "512")] = None,
    ranks: Annotated[int | None, _count("Ranks.", "4096; of a config, one a micro-batch")] = None,
    global_size: Annotated[int | None, _count("Sequences a step.", "8192 or more", "--global-batch")] = None,
    steps: Annotated[int | None, _count("Steps to go through.", "up to 1000")] = None,
    first_sample: Annotated[int | None, _count("Sample of the first step.", "0", "--start-sample")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the order.", show_default="0")] = None,
    as_json: AsJson = False,
) -> int:
    """Work out what a run does with its data, at any scale, without reading any of it.

    Shows blocks, windows and epochs, times a cold start of the order, goes through steps of all ranks to see that each
    sample comes once, and counts the pages that 1 to 4,096 readers read over the bytes they use.

    \b
    Examples:
      maskwright data simulate --tokens 10T --shards 20000 --ranks 4096 --steps 1000 --start-sample 1T
      maskwright data simulate my.yaml batch.global_size=2048 --ranks 64
      maskwright data simulate data/train --global-batch 1024 --ranks 8
    """
    from tools.simulate import SimulateOptions, plan_simulation, simulate

    options = SimulateOptions(
        tokens, shards, vocabulary_size, seq_len, ranks, global_size, steps, first_sample or 0, seed
    )
    simulation = simulate(lambda: plan_simulation(source, overrides or (), options), make_console())
    write_result(simulation, as_json)
    return EXIT_FINISHED if simulation.exactness.each_sample_once else EXIT_UNEXPECTED
