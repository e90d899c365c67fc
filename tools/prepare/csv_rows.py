"""Rows of csv files, with a count of their fields: no row is read into the wrong column.

The dialect is RFC 4180 and nothing else: a field in quotes may hold line ends, separators and doubled quotes. A row
with a field too many is refused unless that field is empty, and so is a quote escaped with a backslash.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.prepare.bad_documents import INVALID_UTF8, WRONG_FIELDS, BadDocument, invalid_utf8
from tools.prepare.compression import compression_of, open_input
from tools.prepare.fields import missing_field
from tools.prepare.lines import OpenedPiece, split_lines
from tools.prepare.option_names import OptionNames
from tools.prepare.paths import shown
from tools.prepare.pieces import Piece, TextSettings
from trainer.errors import UserError

_MARK = "\ufeff"
_LONGEST_FIELD = 1 << 30  # characters; a quote that is never closed should not take all memory
_NAMED_DELIMITERS = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";"}
_USUAL_DELIMITERS = (";", "\t", "|", ",")
_DOUBLE_THE_QUOTES = 'In csv a quote inside quotes is doubled (""), not written \\"; write the file again so.'


def check_delimiter(delimiter: str | None, format: str, names: OptionNames) -> str | None:
    """Find the character that separates fields, from what a user gave; None for the usual one.

    Raises:
        UserError: for more than one character, one that csv needs itself, and a format without delimiters.
    """
    if delimiter is None:
        return None
    character = _NAMED_DELIMITERS.get(delimiter.lower(), delimiter)
    if len(character) != 1 or character in '"\r\n\0' + _MARK:
        raise UserError(
            f"{delimiter!r} cannot separate fields.",
            where=names("delimiter"),
            remedy="Give one character, such as ';', or tab.",
        )
    if format != "csv":
        raise UserError(
            f"Files of format {format} have no delimiter.",
            where=names("delimiter", repr(delimiter)),
            remedy=f"Leave it out; or is this csv? Then give {names('format', 'csv')}.",
        )
    return character


def delimiter_of(path: str, given: str | None) -> str:
    """Find what separates the fields of a file: `given`, else a tab in .tsv files and a comma in others."""
    bare = Path(path).with_suffix("") if compression_of(path) else Path(path)
    return given or ("\t" if bare.suffix.lower() == ".tsv" else ",")


def read_csv(piece: Piece, settings: TextSettings) -> Iterator[tuple[str | BadDocument, int]]:
    """Read the text field of each row, in order, with the bytes of the file read so far.

    Everything is text as it stands: "NA" stays "NA" and 1.50 stays 1.50.
    """
    csv.field_size_limit(_LONGEST_FIELD)
    with OpenedPiece(piece) as opened:
        # A byte that is not UTF-8 becomes half a surrogate: only a row whose text holds one is bad.
        stream = io.TextIOWrapper(opened.file, "utf-8", "surrogateescape", newline="")  # type: ignore[arg-type]
        lines = _Lines(stream)
        file = _CsvFile(piece.file.path, delimiter_of(piece.file.path, settings.delimiter), settings)
        rows = csv.reader(lines, delimiter=file.delimiter, strict=True)
        before = number = 0
        try:
            header = next((row for row in rows if not _is_blank(row)), None)
            if header is None:  # nothing but blank lines
                return
            column = file.column_of(header, rows.line_num)
            before = rows.line_num
            for row in rows:
                if not _is_blank(row) and not (before + 1 in lines.marked and row == header):
                    number += 1
                    place = _Place(number, before + 1, rows.line_num)
                    yield file.text_of(row, header, column, place), opened.position
                before = rows.line_num
        except csv.Error as error:
            raise file.broken(before + 1, rows.line_num, str(error)) from None


class _Lines:
    """The lines of a file without byte order marks; `marked` are the numbers of those after the first that had one."""

    def __init__(self, stream: Iterable[str]) -> None:
        self._stream, self.marked = stream, set[int]()

    def __iter__(self) -> Iterator[str]:
        for number, line in enumerate(self._stream, 1):
            if line[0] == _MARK:
                line = line[1:]
                self.marked.add(number)
            yield line


@dataclass(frozen=True, slots=True)
class _Place:
    """A row: its number, from 1, without the header, and its first and last line."""

    number: int
    first_line: int
    last_line: int


@dataclass(frozen=True)
class _CsvFile:
    path: str
    delimiter: str
    settings: TextSettings

    @property
    def name(self) -> str:
        return shown(Path(self.path).name)

    def column_of(self, header: Sequence[str], last_line: int) -> int:
        """Find which field of a row holds the text; the header ends in line `last_line`."""
        field, names = self.settings.field, self.settings.names
        if header.count(field) == 1:
            return header.index(field)
        if field in header:
            raise UserError(
                f"'{self.name}' has {header.count(field)} columns called '{field}'.",
                where=shown(self.path),
                remedy="Rename all but one of them in its first line.",
            )
        if not _is_utf8("".join(header)):
            raise invalid_utf8(self.path, first_invalid_byte(self.path, 1, last_line))
        found = [other for other in _USUAL_DELIMITERS if len(header) == 1 and other in header[0]]
        hint = ""
        if found:
            shown_delimiter = "tab" if found[0] == "\t" else f"'{found[0]}'"
            hint = f" If {shown_delimiter} separates them, give {names('delimiter', shown_delimiter)}."
        raise missing_field(f"'{self.name}'", field, [name for name in header if name], names, hint)

    def text_of(self, row: Sequence[str], header: Sequence[str], column: int, place: _Place) -> str | BadDocument:
        """Read the text of a row; a row that ends before it, as programs write that drop empty fields, has none."""
        if len(row) > len(header) and any(row[len(header) :]):
            return BadDocument(WRONG_FIELDS, lambda: self._surplus(row, header, place), _size(row))
        if len(row) <= column:
            return ""
        text = row[column]
        if text.endswith("\\") and len(row) > column + 1 and row[column + 1].count('"') % 2:
            # Of "a \", b" it has read "a \" as the whole field.
            return BadDocument(
                WRONG_FIELDS, lambda: self.broken(place.first_line, place.last_line, "a quote after a backslash")
            )
        if text.isascii() or _is_utf8(text):
            return text
        return BadDocument(INVALID_UTF8, lambda: self._invalid(place), _size(row))

    def broken(self, first_line: int, last_line: int, reason: str) -> UserError:
        """Make the error for a row whose quotes do not add up."""
        lines = f"line {first_line}" if last_line <= first_line else f"lines {first_line} to {last_line}"
        if "unexpected end" in reason or "field limit" in reason:
            reason = "a quote is opened and never closed"
        elif "expected after" in reason:
            reason = "a quote inside a field in quotes"
        return UserError(
            f"Cannot tell where a field of '{self.name}' ends: {reason}, in the row at {lines}.",
            where=f"{shown(self.path)}:{first_line}",
            remedy=_DOUBLE_THE_QUOTES,
        )

    def _surplus(self, row: Sequence[str], header: Sequence[str], place: _Place) -> UserError:
        more = next(field for field in row[len(header) :] if field)
        return UserError(
            f"Row {place.number:,} of '{self.name}' (line {place.first_line:,}) has {len(row)} fields, the header "
            f"{len(header)}: '{_short(more)}' has no column.",
            where=f"{shown(self.path)}:{place.first_line}",
            remedy="Put a text that holds the delimiter into quotes, or name the column in the first line.",
        )

    def _invalid(self, place: _Place) -> UserError:
        return invalid_utf8(self.path, first_invalid_byte(self.path, place.first_line, place.last_line))


def first_invalid_byte(path: str, first_line: int, last_line: int) -> int:
    """Find the offset of the first byte that is not UTF-8 in these lines (from 1) of the decompressed file."""
    file, raw = open_input(path)
    offset = 0
    with raw, file:
        for number, line in enumerate(split_lines(file), 1):
            if number > last_line:
                break
            try:
                line.decode()
            except UnicodeDecodeError as error:
                if number >= first_line:
                    return offset + error.start
            offset += len(line)
    return offset


def _is_blank(row: Sequence[str]) -> bool:
    return not row or (len(row) == 1 and row[0].isspace())


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _size(row: Sequence[str]) -> int:
    return sum(len(field) + 1 for field in row)


def _short(text: str) -> str:
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= 40 else text[:40] + "…"
