"""Decoded tokens with their word and sentence starts, for people to look at and as lists."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from rich.text import Text

from trainer.data.decoding import decode_runs
from trainer.data.manifest import SENTENCE_STARTS, WORD_STARTS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WORD_MARK, SENTENCE_MARK = "│", "▸"
_WORD_STYLES = ("cyan", "magenta")
_SENTENCE_STYLE = "bold red"


@dataclass(frozen=True)
class TextRun:
    """The text of some tokens, of which only the first may start a word or a sentence."""

    text: str
    starts_word: bool
    starts_sentence: bool


class MarkedText:
    """The runs of one stretch of tokens.

    Args:
        ids: [n], without separators.
        starts: for each token mark there is bool [n].
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, ids: np.ndarray, starts: Mapping[str, np.ndarray]) -> None:
        nowhere = np.zeros(len(ids), bool)
        words, sentences = (starts.get(mark, nowhere) for mark in (WORD_STARTS, SENTENCE_STARTS))
        cuts = np.flatnonzero(words | sentences).tolist()
        begins = cuts if cuts[:1] == [0] or not len(ids) else [0, *cuts]
        texts = decode_runs(tokenizer, ids.tolist(), [*begins[1:], len(ids)]) if len(ids) else []
        self._runs = [
            TextRun(text, bool(words[begin]), bool(sentences[begin])) for text, begin in zip(texts, begins, strict=True)
        ]

    @property
    def words(self) -> list[str]:
        """The words, without blanks around them; the first may be the rest of one."""
        return _joined([(run.text, run.starts_word) for run in self._runs])

    @property
    def sentences(self) -> list[str]:
        """The sentences, without blanks around them; the first may be the rest of one."""
        return _joined([(run.text, run.starts_sentence) for run in self._runs])

    def plain(self) -> str:
        """Write the text with a mark before each word and each sentence."""
        parts = []
        for run in self._runs:
            blank, visible = _split_blank(run.text)
            sign = SENTENCE_MARK if run.starts_sentence else WORD_MARK if run.starts_word else ""
            parts += [blank, sign if visible else "", visible]
        return "".join(parts)

    def coloured(self) -> Text:
        """Write the text with words in alternating colours, and a mark before each sentence."""
        text, words = Text(), 0
        for run in self._runs:
            blank, visible = _split_blank(run.text)
            words += run.starts_word and visible != ""
            text.append(blank)
            if run.starts_sentence and visible:
                text.append(SENTENCE_MARK, _SENTENCE_STYLE)
            text.append(visible, _WORD_STYLES[words % 2])
        return text


def _joined(runs: list[tuple[str, bool]]) -> list[str]:
    units: list[str] = []
    for text, starts in runs:
        if starts or not units:
            units.append(text)
        else:
            units[-1] += text
    return [unit.strip() or unit for unit in units]


def _split_blank(text: str) -> tuple[str, str]:
    visible = text.lstrip()
    return text[: len(text) - len(visible)], visible
