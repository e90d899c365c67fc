"""A passage as the tokens of a model, and the words of its text that they are parts of."""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

# A Han character, kana or Hangul syllable by itself, a run of other letters and digits, or one other character.
_WIDE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
_UNIT = re.compile(rf"[{_WIDE}]|[^\W_{_WIDE}]+|\S")


@dataclass(frozen=True)
class Unit:
    """A word, or a sign: a stretch [begin, end) of a text, in characters."""

    begin: int
    end: int
    is_word: bool


@dataclass(frozen=True)
class Pieces:
    """A text in the tokens of one model.

    Attributes:
        ids: of the tokens, without any that frame them.
        spans: the characters [begin, end) that each stands for, without blanks around them; begin = end for nothing
            but blanks.
    """

    ids: list[int]
    spans: list[tuple[int, int]]

    def of(self, unit: Unit) -> list[int] | None:
        """Number the tokens of a unit; None where one of them stands for more than the unit."""
        places = [place for place, (begin, end) in enumerate(self.spans) if begin < unit.end and end > unit.begin]
        if not places:
            return None
        first = min(self.spans[place][0] for place in places)
        last = max(self.spans[place][1] for place in places)
        return places if (first, last) == (unit.begin, unit.end) else None

    def groups(self, units: list[Unit]) -> list[int]:
        """Number for each token the unit that it begins in; one that stands for nothing goes with no other."""
        begins = [unit.begin for unit in units]
        return [
            bisect_right(begins, begin) if begin < end else -1 - place for place, (begin, end) in enumerate(self.spans)
        ]


def find_units(text: str) -> list[Unit]:
    """Divide a text into words and signs, whatever its language; the same for all tokenizers."""
    return [Unit(*found.span(), found[0][0].isalnum()) for found in _UNIT.finditer(text)]


class PieceTokenizer:
    """A model's tokenizer, that treats every text as text, as `prepare` does by its `Encoder`."""

    def __init__(self, tokenizer: Any) -> None:
        self._backend: Any = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.post_processor = None  # some cut the blanks off the offsets, others add tokens
        self._backend.encode_special_tokens = True

    def __call__(self, text: str) -> Pieces:
        encoding = self._backend.encode(text, add_special_tokens=False)
        return Pieces(encoding.ids, [_without_blanks(text, *span) for span in encoding.offsets])


def _without_blanks(text: str, begin: int, end: int) -> tuple[int, int]:
    while begin < end and text[begin].isspace():
        begin += 1
    while begin < end and text[end - 1].isspace():
        end -= 1
    return begin, end
