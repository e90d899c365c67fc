"""Special tokens that stand in a text as text: what becomes of them, and how many tokens mean nothing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from trainer.errors import UserError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from trainer.data.tokenizer import Vocabulary

IDS, TEXT, REFUSE = "ids", "text", "refuse"
WAYS = (IDS, TEXT, REFUSE)
SETTING = "special_in_text"
SPECIAL_IN_TEXT = "special token in the text"  # why a document is refused
# How far into the unknown is looked: documents with unknown tokens are encoded once more, with offsets, up to these.
_MEASURED_AT_LEAST, _MEASURED_SHARE, _MEASURED_AT_ONCE = 1 << 14, 1 / 128, 1 << 17  # characters


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens of a tokenizer, by what one that stands in a text becomes.

    Attributes:
        way: "ids", "text" or "refuse", as `--special-in-text` has it.
        ids: those that become their id, with it.
        text: those that stay text: begin, end, pad and mask, which only training places; with "text" all.
        unknown_id: of what the tokenizer has no token for; None where it has none.
        unknown: that token's text where it is among `ids`, else empty.
    """

    way: str
    ids: dict[str, int]
    text: tuple[str, ...]
    unknown_id: int | None
    unknown: str

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast, vocabulary: Vocabulary, way: str) -> SpecialTokens:
        """Sort a tokenizer's special tokens.

        Raises:
            UserError: for an unknown way.
        """
        if way not in WAYS:
            raise UserError(
                f"Unknown way '{way}' with special tokens in the text.{nearest(way, WAYS)}",
                where=f"--special-in-text {way}",
                remedy=f"Choose one of {', '.join(WAYS)}.",
            )
        placed = {vocabulary.begin_id, vocabulary.end_id, vocabulary.separator_id}
        placed.update(role for role in (vocabulary.mask_id, vocabulary.pad_id) if role is not None)
        added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
        special = {token.content: number for number, token in sorted(added.items()) if token.special}
        ids = {token: number for token, number in special.items() if way == IDS and number not in placed}
        text = tuple(token for token in special if token not in ids)
        unknown_id = tokenizer.unk_token_id
        unknown_id = unknown_id if isinstance(unknown_id, int) else None
        unknown = next((token for token, number in ids.items() if number == unknown_id), "")
        return cls(way, ids, text, unknown_id, unknown)

    def recorded(self) -> dict[str, str]:
        """Collect what the manifest and a unit's identity hold; nothing for "text", as before there was a choice."""
        return {} if self.way == TEXT else {SETTING: self.way}

    def open(self, tokenizer_file: str) -> Tokenizer:
        """Load a tokenizer that makes ids of those of `ids`, and text of the other special tokens."""
        if self.ids:
            state = json.loads(Path(tokenizer_file).read_text(encoding="utf-8"))
            for token in state["added_tokens"]:
                token["special"] = token["special"] and token["content"] not in self.ids
            tokenizer = Tokenizer.from_str(json.dumps(state, ensure_ascii=False))
        else:
            tokenizer = Tokenizer.from_file(tokenizer_file)
        tokenizer.encode_special_tokens = True  # of what is special now
        return tokenizer

    def refused(self, text: str) -> str | None:
        """Find the special token because of which a document is refused."""
        return next((token for token in self.text if token in text), None) if self.way == REFUSE else None


NONE_SPECIAL = SpecialTokens(TEXT, {}, (), None, "")
"""All special tokens stay text, and nothing is counted."""


@dataclass
class TokenTally:
    """What has been counted of special and unknown tokens.

    Attributes:
        as_ids: how many of a special token became its id.
        as_text: how many stayed text.
        unknown: tokens that stand for text that the tokenizer does not know.
        characters: of all text.
        measured, measured_characters: some of the unknown tokens, and the characters that they stand for.
        measured_text: characters of the documents that those were measured in.
    """

    as_ids: dict[str, int] = field(default_factory=dict)
    as_text: dict[str, int] = field(default_factory=dict)
    unknown: int = 0
    characters: int = 0
    measured: int = 0
    measured_characters: int = 0
    measured_text: int = 0

    def add(self, other: TokenTally) -> None:
        self.as_ids = dict(Counter(self.as_ids) + Counter(other.as_ids))
        self.as_text = dict(Counter(self.as_text) + Counter(other.as_text))
        for name in ("unknown", "characters", "measured", "measured_characters", "measured_text"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def unknown_characters(self) -> float:
        """About how many characters all unknown tokens stand for."""
        return self.unknown * self.measured_characters / max(1, self.measured)


class TokenCounter:
    """Counts special and unknown tokens; a lookup a token, so that it costs next to nothing.

    Args:
        tokenizer: the one that has made the ids.
    """

    def __init__(self, special: SpecialTokens, tokenizer: Tokenizer) -> None:
        self._special, self._tokenizer = special, tokenizer
        watched = [*special.ids.values(), *([] if special.unknown_id is None else [special.unknown_id])]
        self._is_watched = np.zeros(max(tokenizer.get_vocab().values(), default=0) + 1, bool)
        self._is_watched[watched] = True

    def count(self, texts: Sequence[str], ids: np.ndarray, borders: np.ndarray, tally: TokenTally) -> None:
        """Count in texts and in their ids.

        Args:
            ids: [n], of all texts one after another.
            borders: int64 [texts + 1], where in them those of each text begin, and n.
        """
        special, joined = self._special, "\n".join(texts)
        tally.characters += len(joined)
        tally.add(TokenTally(as_text={token: joined.count(token) for token in special.text}))
        found = np.flatnonzero(self._is_watched[ids])
        if not len(found):
            return
        numbers, counts = np.unique(ids[found], return_counts=True)
        of_id = dict(zip(numbers.tolist(), counts.tolist(), strict=True))
        literal = joined.count(special.unknown) if special.unknown else 0
        as_ids = {token: of_id.get(number, 0) for token, number in special.ids.items() if token != special.unknown}
        if special.unknown:
            as_ids[special.unknown] = literal
        unknown = max(0, of_id.get(special.unknown_id, 0) - literal)
        tally.add(TokenTally(as_ids=as_ids, unknown=unknown))
        if unknown:
            places = found[ids[found] == special.unknown_id]
            self._measure(texts, np.unique(np.searchsorted(borders, places, side="right") - 1).tolist(), tally)

    def _measure(self, texts: Sequence[str], numbers: list[int], tally: TokenTally) -> None:
        """See how much text unknown tokens of some documents stand for: one word of 60 kB is one token."""
        for number in numbers:
            if tally.measured and tally.measured_text > _MEASURED_AT_LEAST + _MEASURED_SHARE * tally.characters:
                return
            text = texts[number][:_MEASURED_AT_ONCE]
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
            spans = [end - begin for token, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True)
                     if token == self._special.unknown_id]  # fmt: skip
            tally.measured += len(spans)
            tally.measured_characters += sum(spans)
            tally.measured_text += len(text)


def resolve_special_in_text(asked: str | None, begun: Sequence[Path]) -> str:
    """Find what `--special-in-text` stands for: when it is left out, what the output was begun with; else "ids".

    Data sets of before there was a choice have all special tokens as text.

    Args:
        begun: files that would record the settings of the output.
    """
    if asked is not None:
        return asked
    for path in begun:
        try:
            settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["settings"]
            return settings.get(SETTING, TEXT)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue  # not there, or not whole: whoever reads it says so
    return IDS
