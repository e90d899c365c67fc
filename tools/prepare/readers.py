"""Reading documents: text and JSON lines by byte ranges, csv by rows, tables through pyarrow.

Text and JSON lines have a reader of our own because `datasets` can neither read a byte range of a file (so one
large file would keep one worker busy) nor say in which line the bad UTF-8 or the broken JSON is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from tools.prepare.bad_documents import (
    BROKEN_JSON,
    INVALID_UTF8,
    MISSING_FIELD,
    NOT_TEXT,
    BadDocument,
    Losses,
    bad_line,
    invalid_utf8,
)
from tools.prepare.fields import MISSING, missing_field, not_text_remedy, value_at
from tools.prepare.lines import OpenedPiece, line_number
from tools.prepare.paths import shown
from tools.prepare.pieces import Piece, TextSettings
from trainer.errors import UserError

_ONE_OBJECT_A_LINE = "Write one JSON object a line; from one JSON array: jq -c '.[]' OLD.json > NEW.jsonl."
_MARK = "\ufeff"
_MARK_OF_LINE = re.compile(f"^{_MARK}", re.MULTILINE)


def read_documents(piece: Piece, settings: TextSettings, losses: Losses | None = None) -> Iterator[tuple[str, int]]:
    """Read the documents of one piece, in order, each with the bytes of the piece consumed so far (as on disk).

    Line ends of all kinds become \\n, byte order marks at the start of lines are dropped, lone surrogates become
    U+FFFD. A document may be empty.

    Args:
        losses: where documents that are left out or repaired are counted.

    Raises:
        UserError: for invalid UTF-8, a line that is no JSON object, a missing field, a csv row with too many fields,
            unless such documents are skipped; and always for a file that cannot be read.
    """
    losses = losses if losses is not None else Losses()
    for text, position in _read(piece, settings):
        if not isinstance(text, BadDocument):
            yield _clean(text, losses), position
        elif settings.on_bad_document == "skip":
            losses.refuse(text)
        else:
            error = text.explain()
            skip = settings.names("on-bad-document", "skip")
            raise UserError(
                error.problem, where=error.where, remedy=f"{error.remedy} To leave such documents out: {skip}."
            )


def _read(piece: Piece, settings: TextSettings) -> Iterator[tuple[str | BadDocument, int]]:
    if settings.format == "hub":
        from tools.prepare.tables import read_table

        return read_table(piece, settings)
    if not piece.file.size:  # also where a format or a codec says that a file of 0 bytes cannot be
        return iter(())
    if settings.format == "jsonl":
        return _read_json_lines(piece, settings)
    if settings.format == "text":
        return _read_text(piece, settings.documents)
    if settings.format == "csv":
        from tools.prepare.csv_rows import read_csv

        return read_csv(piece, settings)
    from tools.prepare.tables import read_table

    return read_table(piece, settings)


def _read_text(piece: Piece, documents: str) -> Iterator[tuple[str | BadDocument, int]]:
    with OpenedPiece(piece) as opened:
        if documents == "file":
            found: Iterator[tuple[int, bytes]] = iter([(0, opened.file.read())])
        else:
            found = opened.paragraphs() if documents == "paragraph" else opened.lines()
        for offset, raw in found:
            text = _decode(raw, offset, piece.file.path)
            if isinstance(text, str):
                text = _normalize_line_ends(text).removesuffix("\n")
                if _MARK in text:
                    text = _MARK_OF_LINE.sub("", text)
            yield text, opened.consumed(offset + len(raw))


def _read_json_lines(piece: Piece, settings: TextSettings) -> Iterator[tuple[str | BadDocument, int]]:
    path = piece.file.path
    with OpenedPiece(piece) as opened:
        for offset, raw in opened.lines():
            line = _decode(raw, offset, path)
            if isinstance(line, BadDocument):
                yield line, opened.consumed(offset + len(raw))
            elif line := line.removeprefix(_MARK).strip():
                found = _field_of(line, settings, path, offset)
                if isinstance(found, BadDocument):
                    found = BadDocument(found.reason, found.explain, len(raw))
                yield found, opened.consumed(offset + len(raw))


def _field_of(line: str, settings: TextSettings, path: str, offset: int) -> str | BadDocument:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return bad_line(BROKEN_JSON, path, offset, f"not JSON ({error})", _ONE_OBJECT_A_LINE)
    if not isinstance(row, dict):
        return bad_line(BROKEN_JSON, path, offset, f"a JSON {type(row).__name__}, not an object", _ONE_OBJECT_A_LINE)
    value, names, field = value_at(row, settings.field), settings.names, settings.field
    if value is MISSING:
        fields = list(row)
        return BadDocument(
            MISSING_FIELD,
            lambda: missing_field(f"{shown(path)}:{line_number(path, offset)}", field, fields, names),
        )
    if value is not None and not isinstance(value, str):
        found = f"field '{field}' holds a {type(value).__name__}, not text"
        return bad_line(NOT_TEXT, path, offset, found, not_text_remedy(field, value, names))
    return value or ""


def _clean(text: str, losses: Losses) -> str:
    text = _normalize_line_ends(text)
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON may spell half a surrogate pair
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        losses.repaired += 1
    return text


def _normalize_line_ends(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _decode(raw: bytes, offset: int, path: str) -> str | BadDocument:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        place = offset + error.start
        return BadDocument(INVALID_UTF8, lambda: invalid_utf8(path, place), len(raw))
