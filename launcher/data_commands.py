"""The commands that turn text into data and look at data: tokenizer, prepare, data."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

import typer

from launcher.command import MOST_LOCAL_RANKS, AsJson, Command, Group, console_of_results, parse_count, write_result
from launcher.console import make_console
from trainer.errors import EXIT_FINISHED, EXIT_UNEXPECTED, UserError

tokenizer_app = typer.Typer(cls=Group, no_args_is_help=True, rich_markup_mode=None)
data_app = typer.Typer(cls=Group, no_args_is_help=True, rich_markup_mode=None)

MOST_SAMPLES = 10_000

Inputs = Annotated[
    list[str],
    typer.Option("--input", metavar="PATH...", help="Files, folders, globs, or compressed files (.gz .zst .xz .bz2)."),
]


Format = Annotated[
    Literal["auto", "text", "jsonl", "csv", "parquet", "arrow", "hub"],
    typer.Option(
        help="auto goes by the file name; with hub, PATH is the name of a dataset on the Hugging Face hub, or "
        "NAME:CONFIG:SPLIT."
    ),
]
TextField = Annotated[
    str,
    typer.Option(help="The column that holds the text (all formats but text); a.b is the field b within a."),
]
Delimiter = Annotated[
    str | None,
    typer.Option(
        metavar="C",
        help="What separates the fields of csv: one character, or tab.",
        show_default="a comma; a tab in .tsv files",
    ),
]
Documents = Annotated[
    Literal["file", "paragraph", "line", "row"] | None,
    typer.Option(help="What a document is.", show_default="paragraph for text, row for the other formats"),
]
OnBadDocument = Annotated[
    Literal["stop", "skip"],
    typer.Option(
        help="What to do with a document that is not UTF-8, not JSON, without the field or not text, or a csv row "
        "with too many fields; skip counts it. A damaged file always stops."
    ),
]


@tokenizer_app.command("train", cls=Command)
def tokenizer_train(
    inputs: Inputs,
    output: Annotated[str, typer.Option("--output", metavar="DIR", help="The tokenizer folder to write.")],
    kind: Annotated[
        Literal["bytelevel-bpe", "wordpiece", "unigram", "character"],
        typer.Option(
            "--type",
            help="bytelevel-bpe as RoBERTa, wordpiece as BERT, unigram as XLM-RoBERTa; character: each character "
            "a token, blanks and line ends too.",
        ),
    ] = "bytelevel-bpe",
    vocabulary_size: Annotated[
        int, typer.Option("--vocab-size", metavar="N", min=1, help="Tokens, special ones included.")
    ] = 50_265,
    cased: Annotated[
        bool, typer.Option("--cased", help="wordpiece: keep capitals and accents (the other types always do).")
    ] = False,
    format: Format = "auto",
    field: TextField = "text",
    delimiter: Delimiter = None,
    documents: Documents = None,
    on_bad_document: OnBadDocument = "stop",
) -> None:
    """Train a tokenizer on text; the folder loads with AutoTokenizer.from_pretrained.

    \b
    Examples:
      maskwright tokenizer train --input texts/*.txt --output tokenizer --vocab-size 32000
      maskwright tokenizer train --input dump.jsonl --field body --type wordpiece --cased --output tokenizer
      maskwright tokenizer train --input novel.txt --documents file --type character --output tokenizer
    """
    from tools.tokenizer import train_tokenizer

    train_tokenizer(
        inputs,
        output,
        kind,
        vocabulary_size,
        make_console(),
        cased=cased,
        format=format,
        field=field,
        documents=documents,
        delimiter=delimiter,
        on_bad_document=on_bad_document,
    )


def prepare(
    inputs: Inputs,
    tokenizer: Annotated[str, typer.Option(metavar="DIR", help="The tokenizer folder.")],
    output: Annotated[str, typer.Option(metavar="DIR", help="The data folder to write.")],
    format: Format = "auto",
    field: TextField = "text",
    delimiter: Delimiter = None,
    documents: Documents = None,
    workers: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, max=MOST_LOCAL_RANKS, help="Tokenizing processes.", show_default="one a core"),
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
    on_bad_document: OnBadDocument = "stop",
    special_in_text: Annotated[
        Literal["ids", "text", "refuse"] | None,
        typer.Option(
            help="What a special token that stands in the text becomes: its id (begin, end, pad and mask stay text), "
            "or text; or its document counts as bad.",
            show_default="ids, or what DIR was begun with",
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Write only share I, from 0, of N; tasks may run at once, on machines that share DIR.",
            show_default="all, or the place in a SLURM job array",
        ),
    ] = None,
    finalize: Annotated[
        bool, typer.Option("--finalize", help="Join what the tasks have written; give the same other options.")
    ] = False,
    word_starts: Annotated[
        str | None,
        typer.Option(
            metavar="S",
            help="Mark where words start: by the tokenizer's own words (tokenizer), by Chinese word segmentation "
            "(jieba), by a list of phrases, one a line (phrases:FILE), or by a function of yours (module:function, "
            "text -> offsets in characters).",
            show_default="not marked",
        ),
    ] = None,
    sentence_starts: Annotated[
        str | None,
        typer.Option(
            metavar="S",
            help="Mark where sentences start: by . ! ? 。！？ … and line ends (rules), one a line (lines), or by "
            "module:function.",
            show_default="not marked",
        ),
    ] = None,
) -> None:
    """Tokenize text once into the shards that training reads.

    The bytes written are the same for any number of workers and tasks, and after any number of interruptions: the same
    command goes on with what is not finished. A document goes to validation by its hash.

    \b
    Examples:
      maskwright prepare --input texts/ --tokenizer tokenizer --output data --validation-fraction 0.01
      maskwright prepare --input 'dump/*.jsonl.zst' --field body --tokenizer tokenizer --output data
      maskwright prepare --input dump/ --tokenizer tokenizer --output data --task 0/8
      maskwright prepare --input dump/ --tokenizer tokenizer --output data --finalize
      maskwright prepare --input texts/ --tokenizer tokenizer --output data --word-starts jieba --sentence-starts rules
    """
    from tools.prepare.share import choose_share

    console = make_console()
    share = choose_share(task, finalize, os.environ)
    if share and task is None:
        console.print(
            f"Task {share}, from SLURM_ARRAY_TASK_ID={os.environ['SLURM_ARRAY_TASK_ID']}; --task 0/1 would do all."
        )

    from launcher.local import core_count
    from tools import prepare as preparation

    job = preparation.open_job(
        inputs=inputs,
        tokenizer=tokenizer,
        output=output,
        format=format,
        field=field,
        documents=documents,
        validation_fraction=validation_fraction,
        on_bad_document=on_bad_document,
        delimiter=delimiter,
        word_starts=word_starts,
        sentence_starts=sentence_starts,
        special_in_text=special_in_text,
    )
    if finalize:
        preparation.finalize_job(job, console)
    elif share:
        preparation.prepare_task(job, share.task, share.tasks, workers or core_count(), console)
    else:
        preparation.prepare_job(job, workers or core_count(), console)


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
