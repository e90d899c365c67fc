"""Where sentences start: one a line, or by a small rule for all languages, without a list of abbreviations."""

from __future__ import annotations

import re

import numpy as np

RULES_VERSION, LINES_VERSION = 2, 1  # recorded in manifests; raise it when the rule changes

_WIDE_ENDS = frozenset("。！？｡．")  # end a sentence without a blank after them
_ENDS = re.escape("".join(sorted(_WIDE_ENDS)) + ".!?…‥؟۔।॥։።။។")
_CLOSING = re.escape("\"'”’»›)]}）］｝〕】》〉」』｣")
_CONTINUING = frozenset(",;:，、；：،؛)]}）］｝〕】》〉」』｣”’»›")
# One class of characters comes first, and is fast to look for.
_BORDER = re.compile(rf"[{_ENDS}\n](?:(?<=\n)\s*|[{_ENDS}]*(?P<closing>[{_ENDS}{_CLOSING}]*)(?P<gap>\s*))")
_TO_TEXT_OF_LINE = re.compile(r"(?:\A|[\r\n])\s*")  # the whole of blank lines at once, so that the time is linear


def line_starts(text: str) -> np.ndarray:
    """Find the offsets of the first visible characters of lines, int64, ascending: a sentence is a line.

    A line ends with \\n, \\r\\n or \\r alone, as for those who read the text. A line of blanks alone starts nothing.
    The first sentence starts where the text does, because the blanks before it would else be one of their own.
    """
    ends = (match.end() for match in _TO_TEXT_OF_LINE.finditer(text))
    starts = np.array([end for end in ends if end < len(text)], np.int64)
    starts[:1] = 0
    return starts


def sentence_starts(text: str) -> np.ndarray:
    """Find the offsets of the first characters of sentences, int64, ascending.

    A sentence starts

    - where the text does, after a blank line, and on a new line unless that goes on in lower case;
    - after . ! ? … and the like, closing quotes and brackets and a blank, unless a lower-case letter follows, or
      the full stop ends an initial or an abbreviation with inner stops (J. R. Tolkien, U.S. Army);
    - after 。！？ and closing quotes and brackets, and after ! ? … in a script without case, without a blank;
    - never before a comma, a colon or a closing bracket.

    "Dr. Smith" is taken for two sentences: abbreviations are a matter of the language.
    """
    first = len(text) - len(text.lstrip())
    starts = [0] if first < len(text) else []  # the blanks before it would else be a sentence of their own
    starts += [match.end() for match in _BORDER.finditer(text, first) if _ends_sentence(text, match)]
    return np.array(starts, np.int64)


def _ends_sentence(text: str, match: re.Match[str]) -> bool:
    """Tell whether the character after the match starts a sentence."""
    place = match.end()
    if place == len(text) or text[place] in _CONTINUING:
        return False
    following, gap = text[place], match["gap"]
    if gap is None:  # a line end after none of the marks
        return match[0].count("\n") > 1 or not following.islower()
    if gap.count("\n") > 1:
        return True
    ends = text[match.start() : match.start("closing")]
    if not _WIDE_ENDS.isdisjoint(ends):
        return True
    if not gap:
        before = text[match.start() - 1 : match.start()]
        return ends != "." and (_is_caseless(following) or (following.isalnum() and _is_caseless(before)))
    return not following.islower() and not (ends == "." and _is_abbreviated(text, match.start()))


def _is_caseless(character: str) -> bool:
    """Tell whether it is a letter of a script without upper and lower case, such as Chinese."""
    return character.isalpha() and character.lower() == character.upper()


def _is_abbreviated(text: str, stop: int) -> bool:
    """Tell whether a single cased letter stands before the full stop at `stop`."""
    letter, before = text[stop - 1 : stop], text[stop - 2 : stop - 1] if stop > 1 else ""
    return letter.isalpha() and not _is_caseless(letter) and not before.isalnum()
