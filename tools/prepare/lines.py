"""A piece of a file, opened: its lines and paragraphs with their places in the decompressed file.

A line ends with \\n, \\r\\n or \\r alone. A byte order mark at the start of a line is no text: files that were
joined with `cat` have one at each seam.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any

from tools.prepare.compression import explain_codec_error, explain_os_error, is_codec_error, open_input
from tools.prepare.pieces import Piece

BOM = b"\xef\xbb\xbf"
_STEP_BYTES = 1 << 16
_LINE_BYTES = 1 << 20


class OpenedPiece:
    """The documents' lines of a piece; what goes wrong while it is open becomes the user's error."""

    def __init__(self, piece: Piece) -> None:
        self._piece = piece
        self._compressed = piece.file.compressed
        # A compressed file is never cut, and its decompressed length is unknown.
        self._end = piece.end if not self._compressed else 1 << 62
        try:
            self.file, self._raw = open_input(piece.file.path)
        except OSError as error:
            raise explain_os_error(piece.file.path, error) from None

    def __enter__(self) -> OpenedPiece:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self.file.close()
        self._raw.close()
        if self._compressed and error is not None and is_codec_error(error):
            raise explain_codec_error(self._piece.file.path, error) from None
        if isinstance(error, OSError):
            raise explain_os_error(self._piece.file.path, error) from None

    @property
    def position(self) -> int:
        """Bytes of the piece that have been read, as on disk; a buffer more than what has been handed out."""
        return min(max(self._raw.tell() - self._piece.start, 0), self._piece.size)

    def consumed(self, offset: int) -> int:
        """Compute the bytes of the piece consumed, as on disk, when the text up to `offset` is read."""
        if self._compressed:
            return self.position
        return min(max(offset - self._piece.start, 0), self._piece.size)

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Read (offset, line) of the lines that start in the piece, without their byte order marks."""
        offset, _ = self._seek()
        if offset >= self._end:
            return
        for line in split_lines(self.file):
            yield offset, line
            offset += len(line)
            if offset >= self._end:
                return

    def paragraphs(self) -> Iterator[tuple[int, bytes]]:
        """Read (offset, paragraph) of the paragraphs that start in the piece.

        A paragraph is a run of lines that are not blank (nothing but ASCII white space).
        """
        offset, inside = self._seek()  # inside a paragraph that starts before the piece
        if offset >= self._end:
            return
        first, lines = offset, []
        for line in split_lines(self.file):
            if is_blank(line):
                if lines:
                    yield first, b"".join(lines)
                inside, lines = False, []
            elif not inside:
                first = first if lines else offset
                lines.append(line)
            offset += len(line)
            if offset >= self._end and not lines:
                return
        if lines:
            yield first, b"".join(lines)

    def _seek(self) -> tuple[int, bool]:
        """Go to the first line that starts in the piece: (its offset, whether the line before it is not blank).

        The offset is that of the piece's end, or beyond it, when none does.
        """
        start = self._piece.start
        if start == 0:
            return 0, False
        offset, is_line_start = self._before(start)
        begin, inside = offset, False
        self.file.seek(offset)
        # In steps, and no further than the piece: one line may be longer than many pieces.
        while offset < self._end and (part := self.file.read(max(_STEP_BYTES, len(BOM)))):
            end = _first_line_end(part)
            if part[:end].endswith(b"\r") and end == len(part) and (after := self.file.read(1)) == b"\n":
                part, end = part + after, end + 1
            text = part[: end or None]
            inside = inside or bool((text.removeprefix(BOM) if is_line_start and offset == begin else text).strip())
            offset += len(text)
            if end:
                break
        inside = inside or (not is_line_start and self._text_before(begin))
        self.file.seek(offset)
        return offset, inside

    def _before(self, start: int) -> tuple[int, bool]:
        """Find where to look for the end of the line that the byte before `start` belongs to.

        Returns:
            (offset, whether that is where this line starts), which is known when the line's byte order mark may be
            near.
        """
        first = max(0, start - 1 - len(BOM))
        self.file.seek(first)
        lines = self.file.read(start - first).splitlines(keepends=True)
        if first == 0 or len(lines) > 1:
            return start - len(lines[-1]), True
        return start - 1, False

    def _text_before(self, end: int) -> bool:
        """Tell whether the line that byte `end` belongs to, and that does not start there, has text before it."""
        step, ends_in_line = max(_STEP_BYTES, 2 * len(BOM)), True
        while end > 0:
            start = max(0, end - step)
            self.file.seek(start)
            part = self.file.read(end - start)
            if ends_in_line:
                part, ends_in_line = part.removesuffix(b"\r"), False  # half of this line's own end
            border = max(part.rfind(b"\n"), part.rfind(b"\r"))
            if border >= 0 or start == 0:
                return not is_blank(part[border + 1 :])
            if part[len(BOM) :].strip():
                return True
            end = start + len(BOM)  # a mark is seen in one part
        return False


def split_lines(file: IO[bytes]) -> Iterator[bytes]:
    """Split a file into lines with their ends; a line of any length, and line ends of all three kinds."""
    parts: list[bytes] = []
    while part := file.readline(_LINE_BYTES):
        ended = part.endswith(b"\n")
        if ended and not parts and (b"\r" not in part or part.find(b"\r") == len(part) - 2):
            yield part
            continue
        looked_at = b"\r" in part or (bool(parts) and parts[-1].endswith(b"\r"))
        parts.append(part)
        if ended or looked_at:
            lines = b"".join(parts).splitlines(keepends=True)
            parts = [] if ended else [lines.pop()]
            yield from lines
    yield from b"".join(parts).splitlines(keepends=True)


def is_blank(line: bytes) -> bool:
    return not line.removeprefix(BOM).strip()


def _first_line_end(part: bytes) -> int:
    """Find how long the first line of `part` is; 0 when it does not end there."""
    newline = part.find(b"\n")
    return_ = part.find(b"\r", 0, newline if newline >= 0 else len(part))
    if return_ < 0:
        return newline + 1
    return return_ + 2 if return_ + 1 == newline else return_ + 1


def line_number(path: str, offset: int) -> int:
    """Find the number, from 1, of the line that holds the byte at `offset` of the decompressed file."""
    file, raw = open_input(path)
    lines, before = 1, b""
    with raw, file:
        while offset > 0 and (part := file.read(min(offset, 1 << 20))):
            pairs = part.count(b"\r\n") + (before == b"\r" and part.startswith(b"\n"))
            lines += part.count(b"\n") + part.count(b"\r") - pairs
            offset -= len(part)
            before = part[-1:]
    return lines
