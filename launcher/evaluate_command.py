"""The command that measures models: evaluate."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from launcher.command import MOST_LOCAL_RANKS, AsJson

_MOST = 10**6

Models = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL...",
        help="A run folder (its newest checkpoint), a checkpoint, a model folder, or a name on the Hugging Face hub; "
        "several are measured side by side.",
    ),
]
Text = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="PATH",
        help="A data set that `prepare` wrote (its validation split, if it has one), or text: a file, a folder or a "
        "glob, tokenized for each model into a temporary folder.",
        show_default="data.validation of the first run",
    ),
]
Against = Annotated[str | None, typer.Option(metavar="MODEL", help="One more model, and the differences from it.")]
Samples = Annotated[
    int | None, typer.Option(metavar="N", min=1, max=_MOST, help="Blocks.", show_default="the first run's, or 1024")
]
SeqLen = Annotated[
    int | None,
    typer.Option(metavar="L", min=8, max=32768, help="Tokens a block.", show_default="the first run's, or 512"),
]
MicroSize = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, max=_MOST, help="Blocks a pass.", show_default="the first run's, or 8"),
]
MaskRatio = Annotated[
    float | None,
    typer.Option(
        metavar="R", min=0.001, max=0.999, help="Share of tokens masked.", show_default="the first run's, or 0.15"
    ),
]
Words = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=0,
        max=_MOST,
        help="Hide N words from every masked model, and count those recovered.",
        show_default="2000 if tokenizers differ",
    ),
]
Pll = Annotated[bool, typer.Option("--pll", help="Pseudo-log-likelihood as well, which takes a pass a token.")]
PllDocuments = Annotated[
    int, typer.Option(metavar="N", min=1, max=_MOST, help="With --pll: for so many lines of the text.")
]
Field = Annotated[
    str | None, typer.Option(metavar="NAME", help="Of text in jsonl, csv or parquet.", show_default="text")
]
Documents = Annotated[
    Literal["file", "paragraph", "line", "row"] | None,
    typer.Option(help="What a document of a text is.", show_default="paragraph, or row"),
]
Probe = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Labelled texts, .csv, .tsv or .jsonl: how well their classes can be read from each encoder as it is.",
    ),
]
ProbeText = Annotated[str, typer.Option(metavar="NAME", help="With --probe: the column of the texts.")]
ProbeLabel = Annotated[str, typer.Option(metavar="NAME", help="With --probe: the column of the classes.")]
Precision = Annotated[Literal["fp32", "bf16", "fp16"], typer.Option(help="Of the forward pass.")]
Processes = Annotated[
    int | None,
    typer.Option(
        "--nproc-per-node",
        metavar="N",
        min=1,
        max=MOST_LOCAL_RANKS,
        help="Processes on this machine, one a GPU; the numbers do not depend on it.",
        show_default="1",
    ),
]
Code = Annotated[bool, typer.Option("--code", help="Run the code that lies in a model's folder.")]


def evaluate(
    models: Models,
    data: Text = None,
    against: Against = None,
    samples: Samples = None,
    seq_len: SeqLen = None,
    micro_size: MicroSize = None,
    mask_ratio: MaskRatio = None,
    words: Words = None,
    pll: Pll = False,
    pll_documents: PllDocuments = 100,
    field: Field = None,
    documents: Documents = None,
    probe: Probe = None,
    probe_text: ProbeText = "text",
    probe_label: ProbeLabel = "label",
    precision: Precision = "fp32",
    process_count: Processes = None,
    code: Code = False,
    as_json: AsJson = False,
) -> int:
    """Measure models on the same blocks and masks, by the code that evaluates in training.

    Loss, perplexity, accuracy, bits a byte, and the losses of guessing and of the frequencies of tokens; where
    tokenizers differ, the share of whole words recovered; with --probe, what can be read from the frozen encoder. A
    checkpoint is evaluated as in its run, with the same numbers. docs/evaluate.md says what each of them means.

    \b
    Examples:
      maskwright evaluate runs/my
      maskwright evaluate bert-base adapted --data held-out.txt --probe labels.csv
      maskwright evaluate my-model --data texts/held-out.txt --against FacebookAI/roberta-base
      maskwright evaluate runs/a runs/b --data data --samples 4096 --pll --json
    """
    from launcher.evaluate import start_evaluation
    from tools.evaluate.options import EvaluateOptions

    options = EvaluateOptions(
        models=(*models, *([] if against is None else [against])),
        against=against,
        data=data,
        samples=samples,
        seq_len=seq_len,
        micro_size=micro_size,
        mask_ratio=mask_ratio,
        words=words,
        pll_documents=pll_documents if pll else 0,
        field=field,
        documents=documents,
        probe=probe,
        probe_text=probe_text,
        probe_label=probe_label,
        precision=precision,
        run_code=code,
    )
    return start_evaluation(options, as_json, process_count)
