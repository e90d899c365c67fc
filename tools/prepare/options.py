"""How a call of `prepare` reads text, and what it writes of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PrepareOptions:
    """The options of `prepare` that have defaults.

    Attributes:
        format: "auto" (by suffix), "text", "jsonl", "csv", "parquet", "arrow" or "hub".
        field: the column that holds the text, for all but text files; `a.b` is the field `b` within `a`.
        documents: "paragraph" (the default), "line" or "file" for text; "row" for the rest, where "line" means it too.
        validation_fraction: share of the documents held out, chosen by the hash of their text; above 0 the data
            sets are `output/train` and `output/validation`.
        on_bad_document: "stop" at a document that is not UTF-8, not JSON, without the field, not text, or a csv row
            with too many fields; or "skip" and count it. A file that cannot be read at all always stops.
        word_starts: "tokenizer", "jieba", "phrases:FILE" or "module:function": mark where words start.
        sentence_starts: "rules", "lines" or "module:function": mark where sentences start.
        delimiter: one character between the fields of csv; None is a tab in .tsv files and a comma in others.
        special_in_text: "ids": a special token that stands in a text becomes its id, but for those of begin, end, pad
            and mask, which stay text; "text": all stay text; "refuse": a document that holds any is a bad one. None is
            what the output was begun with, or "ids".
    """

    format: str = "auto"
    field: str = "text"
    documents: str | None = None
    validation_fraction: float = 0.0
    on_bad_document: str = "stop"
    word_starts: str | None = None
    sentence_starts: str | None = None
    delimiter: str | None = None
    special_in_text: str | None = None
