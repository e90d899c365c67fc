"""The commands that turn text into data: tokenizer, prepare, data."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from launcher.command import AsJson, Command, console_of_results
from launcher.console import make_console

tokenizer_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
data_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

Inputs = Annotated[
    list[str],
    typer.Option("--input", metavar="PATH...", help="Files, folders, globs, or compressed files (.gz .zst .xz .bz2)."),
]


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


@data_app.command("import", cls=Command)
def data_import(
    inputs: Annotated[
        list[str],
        typer.Option("--input", metavar="PATH...", help="Token files, prefixes of them, globs, or folders."),
    ],
    tokenizer: Annotated[str, typer.Option(metavar="DIR", help="The tokenizer that the tokens are of.")],
    output: Annotated[str, typer.Option(metavar="DIR", help="The data folder to write.")],
    source_format: Annotated[
        Literal["auto", "megatron", "datatrove", "datasets"],
        typer.Option("--from", help="megatron: .bin and .idx; datatrove: .ds; datasets: a folder of save_to_disk."),
    ] = "auto",
    field: Annotated[str, typer.Option(help="The column of ids (datasets).")] = "input_ids",
    validation_fraction: Annotated[
        float,
        typer.Option(
            metavar="F",
            min=0.0,
            max=0.5,
            help="Share of the documents to hold out, by the hash of their ids; writes DIR/train and DIR/validation.",
        ),
    ] = 0.0,
    link: Annotated[
        bool | None,
        typer.Option(
            "--link/--no-link",
            help="--link never copies: where a hard link cannot be made it makes a symbolic one, and what would have "
            "to be converted is refused. --no-link always copies.",
            show_default="hard links where they can be made, else conversion",
        ),
    ] = None,
    strip: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TOKEN",
            help="A token to take off the ends of documents, besides the tokenizer's begin, end and pad tokens. "
            "May be given several times.",
            show_default=False,
        ),
    ] = None,
    special_inside: Annotated[
        Literal["refuse", "skip"],
        typer.Option(help="What to do with a document that holds a special token inside: end, or leave it out."),
    ] = "refuse",
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


DataFolder = Annotated[str, typer.Argument(metavar="DIR", help="A folder that `maskwright prepare` wrote.")]


@data_app.command("show", cls=Command)
def data_show(folder: DataFolder, as_json: AsJson = False) -> None:
    """Show counts and sizes, and decode a few blocks as training will see them.

    \b
    Example:
      maskwright data show data/train
    """
    from tools.inspect import show

    show(folder, as_json, console_of_results(as_json))


@data_app.command("verify", cls=Command)
def data_verify(folder: DataFolder, as_json: AsJson = False) -> None:
    """Check every checksum; a damaged file is named, and the exit code is 3.

    \b
    Example:
      maskwright data verify data/train
    """
    from tools.inspect import verify

    verify(folder, as_json, console_of_results(as_json))
