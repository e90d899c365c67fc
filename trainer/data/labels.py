"""Labelled texts in a file of the user's: read, checked, and made into tokens. The probe is fitted to them."""

from __future__ import annotations

import copy
import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.data.order.permutation import KeyPurpose, fold_key, permute
from trainer.errors import UserError, nearest
from trainer.runtime.paths import user_path
from trainer.runtime.plain_text import listed, one_line, shorten
from trainer.runtime.user_files import parse_json, read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_MOST_BYTES = 256 << 20
_LONGEST_FIELD = 1 << 20  # characters; a quote that is never closed should not take the rest of the file
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_SAMPLE = "Give a smaller file, such as a sample of its rows."
_QUOTES = 'In csv and tsv a quote inside quotes is doubled (""), and a field that begins with one stands in quotes.'


@dataclass(frozen=True)
class LabelledTexts:
    """Texts of at least two classes, each with as many texts as there are folds, or more.

    Attributes:
        labels: int64 [n], numbers into `classes`.
        classes: their names, sorted.
        place: the key or option that names the file, with its path, for cards.
    """

    texts: tuple[str, ...]
    labels: np.ndarray
    classes: tuple[str, ...]
    folds: int
    place: str

    @property
    def majority(self) -> float:
        """Share of the most frequent class."""
        return float(np.bincount(self.labels).max() / len(self.labels))

    def describe(self) -> str:
        """Describe them in a line."""
        twice = len(self.texts) - len(set(self.texts))
        again = f"; {twice:,} stand there a second time, which a probe knows by heart" if twice else ""
        return f"probe: {len(self.texts):,} texts, {len(self.classes):,} classes, majority {self.majority:.1%}{again}"


def read_labelled(path: str, text: str, label: str, folds: int, samples: int, key: str) -> LabelledTexts:
    """Read labelled texts; of more than `samples` so many are drawn, the same from the same file.

    Args:
        text, label: names of the columns.
        key: of the config, or the option, that names the file.

    Raises:
        UserError: for a file that is not there or cannot be read, a column that is missing, a row without a text or a
            label, fewer than two classes, and a class of fewer texts than folds.
    """
    place = f"{key} {path}" if key.startswith("-") else f"{key}={path}"
    file = user_path(path, key)
    rows = list(_rows(file, (text, label), place))
    if len(rows) > samples:
        drawn = permute(np.arange(samples, dtype=np.uint64), len(rows), fold_key(KeyPurpose.EVALUATION))
        rows = [rows[number] for number in np.sort(drawn.astype(np.int64)).tolist()]
    names = sorted({name for _, name in rows})
    if len(names) < 2:
        found = f"all of the class '{shorten(names[0], 60)}'" if names else "none"
        raise UserError(
            f"'{file.name}' has {len(rows):,} labelled texts, {found}: there is nothing to tell apart.",
            where=place,
            remedy=f"Give texts of two classes or more, with the class in the column '{label}'.",
        )
    numbers = {name: number for number, name in enumerate(names)}
    labels = np.array([numbers[name] for _, name in rows], np.int64)
    counts = np.bincount(labels)
    if counts.min() < folds:
        few = [f"'{shorten(names[number], 60)}' ({counts[number]})" for number in np.flatnonzero(counts < folds)]
        raise UserError(
            f"Classes with fewer texts than the {folds} folds, of which each needs one: {listed(few)}"
            f"; of the {len(rows):,} texts that are used.",
            where=place,
            remedy="Leave the rows of such classes out, or name several of them alike; or set fewer folds or more "
            "samples. Is the label a number that differs from text to text? Then it is no class.",
        )
    return LabelledTexts(tuple(each for each, _ in rows), labels, tuple(names), folds, place)


def tokenize(labelled: LabelledTexts, tokenizer: PreTrainedTokenizerFast, length: int) -> list[np.ndarray]:
    """Tokenize the texts in the tokenizer's own template, with its special tokens.

    Args:
        length: tokens at most, special ones included.

    Returns:
        int64 [s] of each text, 1 ≤ s ≤ length.

    Raises:
        UserError: when nothing is left of a text.
    """
    own = copy.deepcopy(tokenizer)  # how it cuts is a state of a tokenizer, which would be saved with it
    options: dict[str, Any] = {"padding": False, "return_attention_mask": False, "return_token_type_ids": False}
    found = own(list(labelled.texts), truncation=True, max_length=length, **options)["input_ids"]
    for text, tokens in zip(labelled.texts, found, strict=True):
        if not tokens:
            raise UserError(
                f"The tokenizer leaves nothing of the text {shorten(one_line(text), 60)!r}.",
                where=labelled.place,
                remedy="Remove its row.",
            )
    return [np.array(tokens, np.int64) for tokens in found]


def _rows(file: Path, columns: tuple[str, str], place: str) -> Iterator[tuple[str, str]]:
    """Read text and label of each row.

    Raises:
        UserError: as `read_labelled`, for the file and its rows.
    """
    suffix = file.suffix.lower()
    if suffix not in (*_DELIMITERS, ".jsonl"):
        raise UserError(
            f"'{file.name}' is no .csv, .tsv or .jsonl file.",
            where=place,
            remedy="Give labelled texts in one of these formats, not compressed, with the ending that says which.",
        )
    content = read_text(file, _MOST_BYTES, place, f"Give labelled texts in UTF-8 (iconv -f ENCODING). {_SAMPLE}")
    read = _json_rows(content, place) if suffix == ".jsonl" else _csv_rows(file, content, columns, place)
    for line, row in read:
        for column in columns:
            if column not in row:
                raise _missing_column(f"Line {line:,} of '{file.name}'", column, list(row), place)
        text, label = (row[column] for column in columns)
        if isinstance(label, bool | int):  # of JSON
            label = str(label).lower()
        for column, value in zip(columns, (text, label), strict=True):
            if (fault := _fault(value)) is not None:
                raise UserError(
                    f"Line {line:,} of '{file.name}': '{column}' {fault}.",
                    where=place,
                    remedy="Give each text and its label, or remove the row.",
                )
        yield text, label.strip()


def _fault(value: Any) -> str | None:
    """Say what is wrong with a text or label."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return "is empty"
    if not isinstance(value, str):
        return f"holds a {type(value).__name__}"
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON may spell half of a surrogate pair
        return "is not Unicode"
    return None


def _csv_rows(file: Path, content: str, columns: tuple[str, str], place: str) -> Iterator[tuple[int, dict[str, Any]]]:
    before, limit = 0, csv.field_size_limit(_LONGEST_FIELD)
    rows = csv.reader(io.StringIO(content, newline=""), delimiter=_DELIMITERS[file.suffix.lower()], strict=True)
    try:
        header = next(rows, [])
        for column in columns:
            if header.count(column) != 1:
                raise _missing_column(f"The first line of '{file.name}'", column, header, place)
        before = rows.line_num
        for row in rows:
            if row and len(row) != len(header):
                raise UserError(
                    f"Line {before + 1:,} of '{file.name}' has {len(row)} fields, and the first line {len(header)}.",
                    where=place,
                    remedy=f"Put a text that holds the delimiter into quotes. {_QUOTES}",
                )
            if row:
                yield before + 1, dict(zip(header, row, strict=True))
            before = rows.line_num
    except csv.Error as error:
        raise UserError(
            f"Cannot tell where a field of '{file.name}' ends, in the row at line {before + 1:,}: {error}.",
            where=place,
            remedy=f"{_QUOTES} Or write the texts as .jsonl.",
        ) from None
    finally:
        csv.field_size_limit(limit)


def _json_rows(content: str, place: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(io.StringIO(content), 1):
        if not line.strip():
            continue
        remedy = "Write one JSON object a line."
        row = parse_json(line, place, remedy, f" in line {number:,}")
        if not isinstance(row, dict):
            raise UserError(f"Line {number:,} is no JSON object.", where=place, remedy=remedy)
        yield number, row


def _missing_column(of: str, column: str, found: list[str], place: str) -> UserError:
    if column in found:
        return UserError(f"{of} names '{column}' twice.", where=place, remedy="Rename one of the columns.")
    shown = listed([shorten(one_line(name), 60) for name in found], 10)
    return UserError(
        f"{of} has no '{column}'.{nearest(column, found)} It has: {shown or 'nothing'}.",
        where=place,
        remedy="Name the columns of text and class (in a config eval.probe.text and eval.probe.label).",
    )
