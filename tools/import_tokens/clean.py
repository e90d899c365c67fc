"""What is stored of each document: its content, without the special tokens that another tool put around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from tools.import_tokens.source import Chunk, TokenSource
from trainer.data.tokenizer import Vocabulary
from trainer.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_CONTENT, _AROUND, _FORBIDDEN = 0, 1, 2
_SUSPICIOUS_DOCUMENTS = 100  # fewer may well end alike


@dataclass
class Counts:
    """What was found in documents.

    Attributes:
        documents: those that are stored; `empty` and `skipped` ones are not.
        bare: documents that were stored without a special token at their end.
        joined: documents of several sequences.
        removed: id → how often it was taken off an end of a sequence.
        first_ids, last_ids: at most two of the ids with which contents begin and end.
        longest_stored: tokens of the longest document as it was stored; `of_that_length`: how many are as long.
    """

    documents: int = 0
    bare: int = 0
    empty: int = 0
    skipped: int = 0
    joined: int = 0
    removed: dict[int, int] = field(default_factory=dict)
    first_ids: list[int] = field(default_factory=list)
    last_ids: list[int] = field(default_factory=list)
    longest_stored: int = 0
    of_that_length: int = 0

    def add(self, other: Counts) -> None:
        """Count another part of the same input in."""
        for name in ("documents", "bare", "empty", "skipped", "joined"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for number, count in other.removed.items():
            self.removed[number] = self.removed.get(number, 0) + count
        self.first_ids = sorted({*self.first_ids, *other.first_ids})[:2]
        self.last_ids = sorted({*self.last_ids, *other.last_ids})[:2]
        if other.longest_stored > self.longest_stored:
            self.longest_stored, self.of_that_length = other.longest_stored, 0
        if other.longest_stored == self.longest_stored:
            self.of_that_length += other.of_that_length


@dataclass(frozen=True)
class Cleaned:
    """The contents of a chunk's documents that are not empty: tokens [n], and their ends in it, int64 [documents].

    `differs` is the number of the first document that is not stored as a shard has it (its content, then one
    separator), None when all are.
    """

    tokens: np.ndarray
    ends: np.ndarray
    differs: int | None
    counts: Counts


class Cleaner:
    """Takes special tokens off the ends of sequences, joins the sequences of a document, and checks every id."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        vocabulary: Vocabulary,
        strip: Sequence[str] = (),
        skip_special: bool = False,
    ) -> None:
        """Sort the vocabulary's tokens into content, those around documents, and those that are forbidden inside.

        Args:
            strip: tokens to take off the ends besides the tokenizer's begin, end and pad tokens.
            skip_special: leave documents out that hold a special token inside; else they are refused.

        Raises:
            UserError: when a token of `strip` is not in the vocabulary.
        """
        self._tokenizer, self._vocabulary, self._skip_special = tokenizer, vocabulary, skip_special
        named = ("cls_token_id", "bos_token_id", "sep_token_id", "eos_token_id", "pad_token_id")
        around = [number for name in named if (number := getattr(tokenizer, name)) is not None]
        for token in strip:
            number = tokenizer.get_vocab().get(token)
            if number is None:
                raise UserError(
                    f"The tokenizer has no token '{token}'.",
                    where=f"--strip {token}",
                    remedy="Name a token as it stands in the vocabulary.",
                )
            around.append(number)
        self._kinds = np.full(vocabulary.size, _CONTENT, np.uint8)
        self._kinds[list(vocabulary.special_ids)] = _FORBIDDEN
        unknown = tokenizer.unk_token_id
        if isinstance(unknown, int):
            self._kinds[unknown] = _CONTENT  # what the vocabulary lacks is unknown in `prepare` too
        self._kinds[around] = _AROUND

    def clean(self, chunk: Chunk, source: TokenSource) -> Cleaned:
        """Check and clean the documents of a chunk.

        Raises:
            UserError: for an id that the tokenizer does not have, or a special token inside a document.
        """
        tokens, size, ends, last = chunk.tokens, len(chunk.tokens), chunk.sequence_ends, chunk.document_ends
        starts, first = _starts(ends), _starts(last)
        self._refuse_foreign_ids(chunk, source)
        kinds = self._kinds[tokens]
        begins, stops = _contents(kinds != _AROUND, starts, ends)
        special = np.flatnonzero(kinds != _CONTENT)
        inside = np.searchsorted(special, stops) - np.searchsorted(special, begins)
        skipped = _sums(inside, first, last) > 0
        if skipped.any() and not self._skip_special:
            sequence = int(np.flatnonzero(inside)[0])
            raise self._special_inside(chunk, source, int(special[np.searchsorted(special, begins[sequence])]))
        kept = _between(size, begins, stops)
        removed = dict(zip(*(part.tolist() for part in np.unique(tokens[~kept], return_counts=True)), strict=True))
        if skipped.any():
            stops = np.where(np.repeat(skipped, last - first), begins, stops)
            kept = _between(size, begins, stops)

        lengths, stored = _sums(stops - begins, first, last), _sums(ends - starts, first, last)
        full = lengths > 0
        last_tokens = tokens[ends[last[full] - 1] - 1]
        as_stored = full & (stored == lengths + 1)
        as_stored[full] &= last_tokens == self._vocabulary.separator_id
        content, content_ends = tokens[kept], np.cumsum(lengths[full])
        longest = int(stored.max(initial=0))
        counts = Counts(
            documents=int(full.sum()),
            bare=int((self._kinds[last_tokens] == _CONTENT).sum()),
            empty=int((~full & ~skipped).sum()),
            skipped=int(skipped.sum()),
            joined=int((full & (last - first > 1)).sum()),
            removed=removed,
            first_ids=np.unique(content[content_ends - lengths[full]])[:2].tolist(),
            last_ids=np.unique(content[content_ends - 1])[:2].tolist(),
            longest_stored=longest,
            of_that_length=int((stored == longest).sum()) if longest else 0,
        )
        differs = None if as_stored.all() else chunk.first + int(np.flatnonzero(~as_stored)[0])
        return Cleaned(content, content_ends, differs, counts)

    def describe(self, counts: Counts) -> list[str]:
        """Say what was done to the documents, and what about them looks wrong, a sentence or two each."""
        name = self._tokenizer.convert_ids_to_tokens
        lines = []
        if counts.removed:
            what = ", ".join(f"{count:,} {name(number)}" for number, count in sorted(counts.removed.items()))
            separator = name(self._vocabulary.separator_id)
            lines.append(f"Special tokens at the ends of documents: {what}. Now one {separator} ends each.")
        if 0 < counts.bare < counts.documents:
            lines.append(
                f"{counts.bare:,} of {counts.documents:,} documents end with no special token, where the others do: "
                "they may have been cut."
            )
        if counts.empty or counts.skipped:
            skipped = f", {counts.skipped:,} with a special token inside" if counts.skipped else ""
            lines.append(f"Left out: {counts.empty:,} empty documents{skipped}.")
        if counts.joined:
            lines.append(
                f"Joined the sequences of {counts.joined:,} documents; each had been tokenized by itself, which can "
                "leave the blanks between them out."
            )
        many = counts.documents >= _SUSPICIOUS_DOCUMENTS
        for ids, end in ((counts.first_ids, "begins"), (counts.last_ids, "ends")):
            if many and len(ids) == 1:
                lines.append(
                    f"Every document {end} with '{name(ids[0])}' (id {ids[0]}). If another tool added it, import again "
                    f"with --strip '{name(ids[0])}'."
                )
        if many and 2 * counts.of_that_length > counts.documents:
            lines.append(
                f"{counts.of_that_length:,} of {counts.documents:,} documents have {counts.longest_stored:,} tokens, "
                "and none more: they look like blocks, or like documents cut short. A border is put after each."
            )
        return lines

    def _refuse_foreign_ids(self, chunk: Chunk, source: TokenSource) -> None:
        tokens, size = chunk.tokens, self._vocabulary.size
        if not len(tokens):
            return
        unused = self._vocabulary.unused_ids
        if int(tokens.max()) >= size or int(tokens.min()) < 0:
            foreign, known = (tokens >= size) | (tokens < 0), f"the tokenizer has ids 0 to {size - 1:,}"
        elif unused and (foreign := np.isin(tokens, unused)).any():
            known = "the tokenizer has no token of that id"
        else:
            return
        place = int(np.flatnonzero(foreign)[0])
        raise UserError(
            f"Document {_document_at(chunk, place):,} of '{source.name}' (counted from 0) holds id "
            f"{int(tokens[place]):,}; {known}.",
            where=source.path,
            remedy="Give the tokenizer that the data were tokenized with, with all of its added tokens.",
        )

    def _special_inside(self, chunk: Chunk, source: TokenSource, place: int) -> UserError:
        number = int(chunk.tokens[place])
        return UserError(
            f"Document {_document_at(chunk, place):,} of '{source.name}' (counted from 0) holds the special token "
            f"'{self._tokenizer.convert_ids_to_tokens(number)}' (id {number}) inside.",
            where=source.path,
            remedy="Blocks packed of several documents cannot be imported: prepare the text. If only a few documents "
            "hold one, leave them out with --special-inside skip.",
        )


def _starts(ends: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), ends])[:-1]


def _contents(inner: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find in each [start, end) the range from the first to after the last true of `inner`; empty if there is none."""
    places = np.append(np.flatnonzero(inner), len(inner))
    low, high = np.searchsorted(places, starts), np.searchsorted(places, ends)
    none = low == high
    return np.where(none, ends, places[low]), np.where(none, ends, places[high - 1] + 1)


def _sums(values: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Sum values[first:last] of each document."""
    total = np.concatenate([np.zeros(1, np.int64), np.cumsum(values, dtype=np.int64)])
    return total[last] - total[first]


def _between(size: int, begins: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Mark the ranges: bool [size], true from each begin to before its stop; the ranges do not overlap."""
    some = begins < stops
    steps = np.zeros(size + 1, np.int8)
    steps[begins[some]] += 1
    steps[stops[some]] -= 1
    return np.cumsum(steps[:-1], dtype=np.int8).astype(bool)


def _document_at(chunk: Chunk, place: int) -> int:
    """Find the number, in its source, of the document that holds a token of the chunk."""
    sequence = int(np.searchsorted(chunk.sequence_ends, place, "right"))
    return chunk.first + int(np.searchsorted(chunk.document_ends, sequence, "right"))
