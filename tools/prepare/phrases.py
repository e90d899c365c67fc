"""Words of a list: what stands in it is one word, all other text is token by token.

ERNIE (Sun et al., arXiv:1904.09223) masks phrases and names of things as a whole; here they are those of a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from trainer.errors import UserError
from trainer.runtime.paths import user_path

_FIRST = 2  # characters by which the phrases that may begin at a place are looked up


def read_phrases(path: Path, where: str) -> list[str]:
    """Read a file of one phrase a line, in UTF-8; blank lines, and blanks around a phrase, do not count.

    Raises:
        UserError: when it cannot be read, or holds none.
    """
    try:
        lines = user_path(path, where).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        problem = f"Cannot read the phrases in {path}: {error.strerror}."
        raise UserError(problem, where=where, remedy="Give a file with one phrase a line.") from None
    except UnicodeDecodeError as error:
        problem = f"{path} is not UTF-8: byte {error.start:,}."
        raise UserError(problem, where=where, remedy="Save it as UTF-8.") from None
    phrases = [phrase for line in lines if (phrase := line.strip())]
    if not phrases:
        raise UserError(f"{path} holds no phrase.", where=where, remedy="Give a file with one phrase a line.")
    return phrases


def phrase_segmenter(phrases: Iterable[str]) -> Callable[[str], np.ndarray]:
    """Make a function from a text to where its words start, in characters: int64, ascending.

    From the left the longest phrase is taken that begins at a place. Where it begins or ends with a letter or a digit
    of a script that sets blanks between words, none may stand beside it: "art" is not found in "start".
    """
    by_start: dict[str, list[str]] = {}
    for phrase in sorted(set(phrases), key=lambda phrase: (-len(phrase), phrase)):
        by_start.setdefault(phrase[:_FIRST], []).append(phrase)

    def longest(text: str, place: int) -> int:
        """Return the length of the longest phrase at a place; 1 where there is none."""
        candidates = [*by_start.get(text[place : place + _FIRST], ()), *by_start.get(text[place], ())]
        for phrase in candidates:
            if text.startswith(phrase, place) and _stands_alone(text, place, place + len(phrase)):
                return len(phrase)
        return 1

    def starts(text: str) -> np.ndarray:
        found, place = [], 0
        while place < len(text):
            found.append(place)
            place += longest(text, place)
        return np.array(found, np.int64)

    return starts


def _stands_alone(text: str, start: int, end: int) -> bool:
    return not (_joins(text, start - 1, start) or _joins(text, end - 1, end))


def _joins(text: str, left: int, right: int) -> bool:
    """Tell whether the characters at both places are of one word, in a script that sets blanks between words."""
    return left >= 0 and right < len(text) and _is_of_a_word(text[left]) and _is_of_a_word(text[right])


def _is_of_a_word(character: str) -> bool:
    # Chinese, Japanese and Thai set no blanks; Korean sets them, but its endings stand at the word.
    return character.isalnum() and (character < "\u0e00" or "\u1000" <= character < "\u1100")
