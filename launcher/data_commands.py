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
    word_starts: Annotated[
        str | None,
        typer.Option(
            metavar="S",
            help="Mark where words start: by the tokenizer's own words (tokenizer), by Chinese word segmentation "
            "(jieba), or by a function of yours (module:function, text -> offsets in characters).",
            show_default="not marked",
        ),
    ] = None,
    sentence_starts: Annotated[
        str | None,
        typer.Option(
            metavar="S",
            help="Mark where sentences start: by . ! ? 。！？ … and line ends (rules), or by module:function.",
            show_default="not marked",
        ),
    ] = None,
) -> None:
    """Tokenize text once into the shards that training reads.

    The bytes written are the same for any number of workers. A document goes to validation by its hash.

    \b
    Examples:
      maskwright prepare --input texts/ --tokenizer tokenizer --output data --validation-fraction 0.01
      maskwright prepare --input 'dump/*.jsonl.zst' --field body --tokenizer tokenizer --output data
      maskwright prepare --input texts/ --tokenizer tokenizer --output data --word-starts jieba --sentence-starts rules
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
        word_starts=word_starts,
        sentence_starts=sentence_starts,
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
