"""Reading documents: text and JSON lines by byte ranges, tables through `datasets`.

Text and JSON lines have a reader of our own because `datasets` can neither read a byte range of a file (so one
large file would keep one worker busy) nor say in which line the bad UTF-8 or the broken JSON is.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import zstandard

from tools.prepare.plan import Piece
from trainer.errors import UserError, nearest

BOM = b"\xef\xbb\xbf"
INVALID_UTF8, BROKEN_JSON, MISSING_FIELD, NOT_TEXT = "invalid UTF-8", "broken JSON", "missing field", "not text"
_STEP_BYTES = 1 << 16
_ONE_OBJECT_A_LINE = "Write one JSON object a line; from one JSON array: jq -c '.[]' OLD.json > NEW.jsonl."
_BROKEN_COMPRESSION = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, zstandard.ZstdError)


@dataclass(frozen=True)
class ReadSettings:
    """How inputs become documents. `scratch` is a folder for the few small files that `datasets` writes."""

    format: str
    documents: str
    field: str
    scratch: str


@dataclass(frozen=True)
class BadDocument:
    """A document that cannot be read: why, and what makes the user's error of it.

    Making the error may read the file again, to name the line; that is left out when bad documents are only counted.
    """

    reason: str
    explain: Callable[[], UserError]


def read_documents(
    piece: Piece, settings: ReadSettings, refused: dict[str, int] | None = None
) -> Iterator[tuple[str, int]]:
    """The documents of one piece, in order, each with the bytes of the piece consumed so far (as on disk).

    Line ends are normalised to \\n, a byte order mark is dropped, lone surrogates become U+FFFD. A document may
    be empty.

    Args:
        refused: where documents that cannot be read are counted by reason, and left out; None makes one an error.

    Raises:
        UserError: for invalid UTF-8, a line that is no JSON object, a missing field, a damaged compressed file.
    """
    if settings.format == "jsonl":
        found = _read_json_lines(piece, settings.field)
    elif settings.format == "text":
        found = _read_text(piece, settings.documents)
    else:
        from tools.prepare.tables import read_table

        found = read_table(piece, settings)
    for text, position in found:
        if not isinstance(text, BadDocument):
            yield _clean(text), position
        elif refused is None:
            error = text.explain()
            remedy = f"{error.remedy} To leave such documents out: prepare --on-bad-document skip."
            raise UserError(error.problem, where=error.where, remedy=remedy)
        else:
            refused[text.reason] = refused.get(text.reason, 0) + 1


def open_input(path: str) -> tuple[IO[bytes], IO[bytes]]:
    """(the file decompressed according to its suffix, the raw file beneath it)."""
    raw = open(path, "rb", buffering=1 << 20)
    suffix = Path(path).suffix.lower()
    if suffix == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 20), raw  # type: ignore[arg-type]
    if suffix == ".bz2":
        return io.BufferedReader(bz2.BZ2File(raw), 1 << 20), raw  # type: ignore[arg-type]
    if suffix == ".xz":
        return io.BufferedReader(lzma.LZMAFile(raw), 1 << 20), raw  # type: ignore[arg-type]
    if suffix == ".zst":
        return io.BufferedReader(ZstdReader(raw), 1 << 20), raw
    return raw, raw


class ZstdReader(io.RawIOBase):
    """Decompresses all frames of a .zst file; a file cut short raises EOFError (zstandard's own reader stops after
    the first frame, and takes the end of a cut file for the end of the text)."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw, self._frame, self._text = raw, None, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text:
            compressed = self._raw.read(1 << 17)
            if not compressed:
                if self._frame is not None:
                    raise EOFError("the last zstd frame is cut short")
                return 0
            parts = []
            while compressed:
                self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
                parts.append(self._frame.decompress(compressed))
                compressed = b""
                if self._frame.eof:
                    compressed, self._frame = self._frame.unused_data, None
            self._text = b"".join(parts)
        count = min(len(buffer), len(self._text))
        buffer[:count] = self._text[:count]
        self._text = self._text[count:]
        return count


def invalid_utf8(path: str, offset: int) -> UserError:
    """The error for the byte at `offset` of the (decompressed) file."""
    file, raw = open_input(path)
    with raw, file:
        start = file.read(4)
    utf16 = start[:2] in (b"\xff\xfe", b"\xfe\xff")
    encoding = "UTF-16" if utf16 else "ISO-8859-1"
    guess = "" if utf16 else " (or the encoding it really has)"
    return UserError(
        f"Not valid UTF-8: line {line_number(path, offset)}, byte {offset:,} of '{Path(path).name}'.",
        where=path,
        remedy=f"Convert it: iconv -f {encoding} -t UTF-8 OLD > NEW{guess}.",
    )


def line_number(path: str, offset: int) -> int:
    """Number, from 1, of the line that holds the byte at `offset` of the decompressed file."""
    file, raw = open_input(path)
    lines = 1
    with raw, file:
        while offset > 0 and (part := file.read(min(offset, 1 << 20))):
            lines += part.count(b"\n")
            offset -= len(part)
    return lines


def _read_text(piece: Piece, documents: str) -> Iterator[tuple[str | BadDocument, int]]:
    with _Opened(piece) as opened:
        if documents == "file":
            found: Iterator[tuple[int, bytes]] = iter([(0, opened.file.read())])
        else:
            found = opened.paragraphs() if documents == "paragraph" else opened.lines()
        for offset, raw in found:
            text = _decode(raw, offset, piece.file.path)
            if isinstance(text, str):
                text = text.removesuffix("\n").removesuffix("\r")
            yield text, opened.consumed(offset + len(raw))


def _read_json_lines(piece: Piece, field: str) -> Iterator[tuple[str | BadDocument, int]]:
    path = piece.file.path
    with _Opened(piece) as opened:
        for offset, raw in opened.lines():
            line = _decode(raw, offset, path)
            if isinstance(line, BadDocument):
                yield line, opened.consumed(offset + len(raw))
            elif line.strip():
                yield _field_of(line, field, path, offset), opened.consumed(offset + len(raw))


def _field_of(line: str, field: str, path: str, offset: int) -> str | BadDocument:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return _bad_row(BROKEN_JSON, path, offset, f"not JSON ({error})", _ONE_OBJECT_A_LINE)
    if not isinstance(row, dict):
        return _bad_row(BROKEN_JSON, path, offset, f"a JSON {type(row).__name__}, not an object", _ONE_OBJECT_A_LINE)
    if field not in row:
        fields = list(row)
        return BadDocument(MISSING_FIELD, lambda: missing_field(f"{path}:{line_number(path, offset)}", field, fields))
    value = row[field]
    if value is not None and not isinstance(value, str):
        found = f"field '{field}' holds a {type(value).__name__}, not text"
        return _bad_row(NOT_TEXT, path, offset, found, "Name the field that holds the text with --field.")
    return value or ""


def _bad_row(reason: str, path: str, offset: int, found: str, remedy: str) -> BadDocument:
    def explain() -> UserError:
        line = line_number(path, offset)
        return UserError(f"Line {line} of '{Path(path).name}': {found}.", where=f"{path}:{line}", remedy=remedy)

    return BadDocument(reason, explain)


def missing_field(where: str, field: str, fields: list[str]) -> UserError:
    return UserError(
        f"No field '{field}' in {where}.{nearest(field, fields)}",
        where=f"--field {field}",
        remedy=f"Its fields are: {', '.join(map(str, fields)) or 'none'}.",
    )


def _clean(text: str) -> str:
    if "\r" in text:
        text = text.replace("\r\n", "\n")
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON may spell half a surrogate pair
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _decode(raw: bytes, offset: int, path: str) -> str | BadDocument:
    skipped = len(BOM) if offset == 0 and raw.startswith(BOM) else 0
    try:
        return raw[skipped:].decode() if skipped else raw.decode()
    except UnicodeDecodeError as error:
        place = offset + skipped + error.start
        return BadDocument(INVALID_UTF8, lambda: invalid_utf8(path, place))


def _is_blank(line: bytes, offset: int) -> bool:
    return not (line.removeprefix(BOM) if offset == 0 else line).strip()


class _Opened:
    """A piece, opened: its lines or paragraphs with their offsets in the decompressed file."""

    def __init__(self, piece: Piece) -> None:
        self._piece = piece
        self.file, self._raw = open_input(piece.file.path)
        self._compressed = piece.file.compressed
        # A compressed file is never cut, and its decompressed length is unknown.
        self._end = piece.end if not self._compressed else 1 << 62

    def __enter__(self) -> _Opened:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self.file.close()
        self._raw.close()
        broken_bz2 = isinstance(error, OSError) and "Invalid data stream" in str(error)
        if self._compressed and (isinstance(error, _BROKEN_COMPRESSION) or broken_bz2):
            raise UserError(
                f"Cannot decompress '{Path(self._piece.file.path).name}': {error}.",
                where=self._piece.file.path,
                remedy="It is damaged or was cut short; fetch it again.",
            ) from None

    def consumed(self, offset: int) -> int:
        """Bytes of the piece consumed, as on disk, when the text up to `offset` is read."""
        position = self._raw.tell() if self._compressed else offset
        return min(max(position - self._piece.start, 0), self._piece.size)

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """(offset, line) of the lines that start in the piece."""
        offset, _ = self._seek()
        while offset < self._end and (line := self.file.readline()):
            yield offset, line
            offset += len(line)

    def paragraphs(self) -> Iterator[tuple[int, bytes]]:
        """(offset, paragraph) of the paragraphs that start in the piece.

        A paragraph is a run of lines that are not blank (nothing but ASCII white space).
        """
        offset, inside = self._seek()  # inside a paragraph that starts before the piece
        first, lines = offset, []
        while (lines or offset < self._end) and (line := self.file.readline()):
            if _is_blank(line, offset):
                if lines:
                    yield first, b"".join(lines)
                inside, lines = False, []
            elif not inside:
                first = first if lines else offset
                lines.append(line)
            offset += len(line)
        if lines:
            yield first, b"".join(lines)

    def _seek(self) -> tuple[int, bool]:
        """Go to the first line that starts in the piece: (its offset, whether the line before it is not blank).

        The offset is that of the piece's end, or beyond it, when none does.
        """
        start = self._piece.start
        if start == 0:
            return 0, False
        if start <= len(BOM):
            first = self.file.readline()
            if start <= len(first):
                return len(first), not _is_blank(first, 0)
        self.file.seek(start - 1)
        offset, inside = start - 1, False
        # In steps, and no further than the piece: one line may be longer than many pieces.
        while offset < self._end and (part := self.file.readline(_STEP_BYTES)):
            offset += len(part)
            inside = inside or bool(part.strip())
            if part.endswith(b"\n"):
                break
        inside = inside or self._text_before(start - 1)
        self.file.seek(offset)
        return offset, inside

    def _text_before(self, end: int) -> bool:
        """Whether the line that byte `end` belongs to has anything but white space before it."""
        while end > 0:
            start = end - _STEP_BYTES if end > _STEP_BYTES + len(BOM) else 0  # the mark in one part
            self.file.seek(start)
            part = self.file.read(end - start)
            newline = part.rfind(b"\n")
            line = part[newline + 1 :]
            if start == 0 and newline < 0:
                line = line.removeprefix(BOM)
            if line.strip():
                return True
            if newline >= 0:
                return False
            end = start
        return False
