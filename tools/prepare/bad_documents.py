"""Documents that cannot be read, and the user's error that each would be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tools.prepare.compression import open_input
from tools.prepare.lines import line_number
from tools.prepare.paths import shown
from trainer.errors import UserError

INVALID_UTF8, BROKEN_JSON, MISSING_FIELD, NOT_TEXT = "invalid UTF-8", "broken JSON", "missing field", "not text"
WRONG_FIELDS = "wrong number of csv fields"


@dataclass(frozen=True)
class BadDocument:
    """A document that cannot be read: why, and what makes the user's error of it.

    Making the error may read the file again, to name the line; that is left out when bad documents are only counted.
    `size` is its bytes as far as they are known.
    """

    reason: str
    explain: Callable[[], UserError]
    size: int = 0


@dataclass
class Losses:
    """What reading left out or changed.

    Attributes:
        refused: documents that were left out, by reason.
        refused_bytes: their bytes, of lines and csv rows.
        repaired: documents in which half a surrogate pair became U+FFFD.
    """

    refused: dict[str, int] = field(default_factory=dict)
    refused_bytes: int = 0
    repaired: int = 0

    def refuse(self, document: BadDocument) -> None:
        """Count a document that is left out."""
        self.refused[document.reason] = self.refused.get(document.reason, 0) + 1
        self.refused_bytes += document.size


def bad_line(reason: str, path: str, offset: int, found: str, remedy: str) -> BadDocument:
    """Make a bad document of the line that starts at `offset` of the decompressed file."""

    def explain() -> UserError:
        line = line_number(path, offset)
        name, where = shown(Path(path).name), f"{shown(path)}:{line}"
        return UserError(f"Line {line} of '{name}': {found}.", where=where, remedy=remedy)

    return BadDocument(reason, explain)


def invalid_utf8(path: str, offset: int) -> UserError:
    """Make the error for the byte at `offset` of the decompressed file."""
    file, raw = open_input(path)
    with raw, file:
        start = file.read(4)
    utf16 = start[:2] in (b"\xff\xfe", b"\xfe\xff")
    encoding = "UTF-16" if utf16 else "ISO-8859-1"
    guess = "" if utf16 else " (or the encoding it really has)"
    return UserError(
        f"Not valid UTF-8: line {line_number(path, offset)}, byte {offset:,} of '{shown(Path(path).name)}'.",
        where=shown(path),
        remedy=f"Convert it: iconv -f {encoding} -t UTF-8 OLD > NEW{guess}.",
    )
