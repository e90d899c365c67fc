"""Text from users and files where people see it: control characters are shown, not obeyed, and long text is cut.

A name may hold anything but NUL and a slash: line ends, which open a new line in a script, and escape sequences, which
retitle, recolour or clear a terminal. Whatever is shown passes through `printable`; whatever becomes a line of a script
is refused where `has_control` finds something.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

# C0 and C1 with DEL, line and paragraph separators, and marks that turn the order of what follows around.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_UNPRINTABLE = re.compile(r"(?![\n\t])[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_LONG_WORD = re.compile(r"\S{401,}")
_WORD_KEPT = 300  # characters of a long word; a path on a cluster can have so many
_LINES_KEPT = 12


def has_control(text: str) -> bool:
    """Tell whether text holds a control character: a line end, a tab, an escape."""
    return _CONTROL.search(text) is not None


def printable(text: str) -> str:
    """Write control characters and what is not Unicode as escapes (`\\u001b`); line ends and tabs stay.

    JSON stays JSON of the same value.
    """
    return _UNPRINTABLE.sub(_escape, text)


def one_line(text: str) -> str:
    """Write all control characters as escapes, line ends and tabs as well."""
    return printable(_CONTROL.sub(_escape, text))


def shorten(text: str, limit: int = 200) -> str:
    """Cut text to about `limit` characters; its start and its end stay, and the cut says how much is left out."""
    if len(text) <= limit:
        return text
    tail = limit // 4
    return f"{text[: limit - tail]}…({len(text) - limit:,} more characters)…{text[-tail:]}"


def fit(text: str, limit: int) -> str:
    """Make text printable and short: words (values, paths), lines, and all of it, `limit` characters at most."""
    lines = shorten(_LONG_WORD.sub(lambda match: shorten(match[0], _WORD_KEPT), printable(text)), limit).splitlines()
    return "\n".join(
        [*lines[:_LINES_KEPT], *([f"… and {more:,} more lines"] if (more := len(lines) - _LINES_KEPT) > 0 else [])]
    )


def foreign_message(error: BaseException, limit: int = 500) -> str:
    """Put what a library's exception says on one line: the cause is often not in its first one."""
    return shorten(" ".join(str(error).split()) or type(error).__name__, limit)


def listed(items: Sequence[str], limit: int = 5, separator: str = ", ") -> str:
    """Join the first few items, and say how many more there are."""
    more = len(items) - limit
    return separator.join(items[:limit]) + (f" and {more:,} more" if more > 0 else "")


def _escape(match: re.Match[str]) -> str:
    return f"\\u{ord(match[0]):04x}"
