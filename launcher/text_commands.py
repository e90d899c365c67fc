"""The commands that read text: tokenizer train and prepare."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from launcher.command import MOST_LOCAL_RANKS, Command, Group, parse_size
from launcher.console import make_console
from trainer.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from tools.prepare.share import Share

tokenizer_app = typer.Typer(cls=Group, no_args_is_help=True, rich_markup_mode=None)

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
    typer.Option(
        help="What a document is. Of formats other than text a line is a row.",
        show_default="paragraph for text, row for the other formats",
    ),
]
OnBadDocument = Annotated[
    Literal["stop", "skip"],
    typer.Option(
        help="What to do with a document that is not UTF-8, not JSON, without the field or not text, or a csv row "
        "with too many fields; skip counts it. A damaged file always stops."
    ),
]


TokenizerOutput = Annotated[str, typer.Option("--output", metavar="DIR", help="The tokenizer folder to write.")]
TokenizerKind = Annotated[
    Literal["bytelevel-bpe", "wordpiece", "unigram", "character"] | None,
    typer.Option(
        "--type",
        help="bytelevel-bpe as RoBERTa, wordpiece as BERT, unigram as XLM-RoBERTa; character: each character "
        "a token, blanks and line ends too.",
        show_default="bytelevel-bpe",
    ),
]
Like = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="TOKENIZER",
        help="In place of --type: a tokenizer, folder or hub name; its kind, the way it cuts text and its special "
        "tokens are taken over, its pieces of words are learnt anew.",
        show_default=False,
    ),
]
VocabularySize = Annotated[
    int | None,
    typer.Option(
        "--vocab-size",
        metavar="N",
        min=1,
        help="Tokens, special ones included.",
        show_default="50265; with --from as many as that has",
    ),
]
Cased = Annotated[
    bool, typer.Option("--cased", help="wordpiece: keep capitals and accents (the other types always do).")
]
MoreSpecialTokens = Annotated[
    list[str] | None,
    typer.Option(
        "--special-token",
        metavar="TOKEN",
        help="One more special token, which stands for itself wherever a text has it. May be given several times.",
        show_default=False,
    ),
]
Sample = Annotated[
    int | None,
    typer.Option(
        parser=parse_size,
        metavar="SIZE",
        help="Read about so much of the files, such as 500MB or 10GB, from all over them.",
        show_default="all",
    ),
]


@tokenizer_app.command("train", cls=Command)
def tokenizer_train(
    inputs: Inputs,
    output: TokenizerOutput,
    kind: TokenizerKind = None,
    like: Like = None,
    vocabulary_size: VocabularySize = None,
    cased: Cased = False,
    special_tokens: MoreSpecialTokens = None,
    sample: Sample = None,
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
      maskwright tokenizer train --input corpus/ --sample 10GB --from FacebookAI/roberta-base --output tokenizer
    """
    if like is not None and (kind is not None or cased):
        given = "--cased" if kind is None else f"--type {kind}"
        raise UserError(
            f"With --from the kind of tokenizer is settled: {given} does nothing.",
            where=given,
            remedy="Leave out one of the two.",
        )

    from tools.tokenizer import train_tokenizer
    from tools.training_text import ReadOptions

    train_tokenizer(
        inputs,
        output,
        kind or "bytelevel-bpe",
        vocabulary_size,
        make_console(),
        cased=cased,
        source=like,
        special_tokens=special_tokens or (),
        reading=ReadOptions(format, field, documents, delimiter, on_bad_document, sample),
    )


@tokenizer_app.command("extend", cls=Command)
def tokenizer_extend(
    source: Annotated[
        str, typer.Option("--from", metavar="MODEL", help="A folder or hub name of a model, or of its tokenizer.")
    ],
    inputs: Inputs,
    add: Annotated[int, typer.Option(metavar="N", min=1, max=1_000_000, help="How many words to add.")],
    output: TokenizerOutput,
    words: Annotated[
        str,
        typer.Option(
            metavar="S",
            help="What a word is: what the tokenizer takes for one (tokenizer), or for text without blanks by Chinese "
            "word segmentation (jieba), a list (phrases:FILE), or a function of yours (module:function, text -> "
            "offsets in characters).",
        ),
    ] = "tokenizer",
    sample: Sample = None,
    format: Format = "auto",
    field: TextField = "text",
    delimiter: Delimiter = None,
    documents: Documents = None,
    on_bad_document: OnBadDocument = "stop",
) -> None:
    """Add words of a text that a tokenizer tears apart most often, and show tokens a word before and after.

    Old tokens keep their ids. Train on with the model as model.from_pretrained, and the new folder as model.tokenizer:
    the model gets rows for the new words, which start at the mean of the old ones.

    \b
    Examples:
      maskwright tokenizer extend --from google-bert/bert-base-uncased --input papers/ --add 2000 --output tokenizer
      maskwright tokenizer extend --from bert-chinese --input texts/ --add 5000 --words jieba --output tokenizer
    """
    from tools.extend_tokenizer import extend_tokenizer
    from tools.training_text import ReadOptions

    reading = ReadOptions(format, field, documents, delimiter, on_bad_document, sample)
    extend_tokenizer(source, inputs, output, add, make_console(), words=words, reading=reading)


TokenizerFolder = Annotated[str, typer.Option(metavar="DIR", help="The tokenizer folder.")]
DataOutput = Annotated[str, typer.Option(metavar="DIR", help="The data folder to write.")]
Workers = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, max=MOST_LOCAL_RANKS, help="Tokenizing processes.", show_default="one a core"),
]
ValidationFraction = Annotated[
    float,
    typer.Option(
        metavar="F",
        min=0.0,
        max=0.5,
        help="Share of the documents to hold out; writes DIR/train and DIR/validation.",
    ),
]
SpecialInText = Annotated[
    Literal["ids", "text", "refuse"] | None,
    typer.Option(
        help="What a special token that stands in the text becomes: its id (begin, end, pad and mask stay text), "
        "or text; or its document counts as bad.",
        show_default="ids, or what DIR was begun with",
    ),
]
Task = Annotated[
    str | None,
    typer.Option(
        metavar="I/N",
        help="Write only share I, from 0, of N; tasks may run at once, on machines that share DIR.",
        show_default="all, or the place in a SLURM job array",
    ),
]
Finalize = Annotated[
    bool, typer.Option("--finalize", help="Join what the tasks have written; give the same other options.")
]
WordStarts = Annotated[
    str | None,
    typer.Option(
        metavar="S",
        help="Mark where words start: by the tokenizer's own words (tokenizer), by Chinese word segmentation "
        "(jieba), by a list of phrases, one a line (phrases:FILE), or by a function of yours (module:function, "
        "text -> offsets in characters).",
        show_default="not marked",
    ),
]
SentenceStarts = Annotated[
    str | None,
    typer.Option(
        metavar="S",
        help="Mark where sentences start: by . ! ? 。！？ … and line ends (rules), one a line (lines), or by "
        "module:function.",
        show_default="not marked",
    ),
]


def prepare(
    inputs: Inputs,
    tokenizer: TokenizerFolder,
    output: DataOutput,
    format: Format = "auto",
    field: TextField = "text",
    delimiter: Delimiter = None,
    documents: Documents = None,
    workers: Workers = None,
    validation_fraction: ValidationFraction = 0.0,
    on_bad_document: OnBadDocument = "stop",
    special_in_text: SpecialInText = None,
    task: Task = None,
    finalize: Finalize = False,
    word_starts: WordStarts = None,
    sentence_starts: SentenceStarts = None,
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
    console = make_console()
    share = _choose_share(task, finalize, console)

    from tools import prepare as preparation

    options = preparation.PrepareOptions(
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
    job = preparation.open_job(inputs, tokenizer, output, options)
    if finalize:
        preparation.finalize_job(job, console)
    elif share:
        preparation.prepare_task(job, share.task, share.tasks, workers, console)
    else:
        preparation.prepare_job(job, workers, console)


def _choose_share(task: str | None, finalize: bool, console: Console) -> Share | None:
    """Choose the share of this command as `choose_share` does, and say it where nobody asked for it."""
    from tools.prepare.share import choose_share

    share = choose_share(task, finalize, os.environ)
    if share and task is None:
        array_task = os.environ["SLURM_ARRAY_TASK_ID"]
        console.print(f"Task {share}, from SLURM_ARRAY_TASK_ID={array_task}; --task 0/1 would do all.")
    return share
