"""Texts to token ids, in batches, with plain `tokenizers` in one thread: a process a core scales better."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np
from tokenizers import Encoding, Tokenizer

from tools.prepare.segment import Segmenter
from tools.prepare.special_tokens import NONE_SPECIAL, SpecialTokens, TokenCounter, TokenTally

BATCH_CHARACTERS = 1 << 20
BATCH_DOCUMENTS = 512
_CONTEXT_CHARACTERS = 64  # on each side of a cut, to see whether a word goes on across it
_BLANKS = ("Ġ", "▁")  # a blank in the vocabularies of byte-level BPE and of Metaspace


@dataclass(frozen=True)
class EncodedText:
    """A text as the shards hold it.

    Attributes:
        ids: [n] in the dtype of the shards.
        starts: for each token mark bool [n].
    """

    ids: np.ndarray
    starts: dict[str, np.ndarray]


class Encoder:
    """A tokenizer that treats every text as text.

    No special token is added, and a literal "</s>" or "<mask>" in a text does not become the special id; what others
    become `special` says. A text of more than a million characters is encoded in pieces, cut where a word starts:
    `tokenizers` needs about a hundred bytes a character, and a text of gigabytes should not need hundreds of them.

    Args:
        segmenters: for each token mark to mark its function from a text to offsets, which sees a whole text however
            long; None marks the words of the tokenizer's pre-tokenizer.
        special: what becomes of special tokens that stand in a text.
    """

    def __init__(
        self,
        tokenizer_file: str,
        dtype: np.dtype,
        segmenters: Mapping[str, Segmenter | None] | None = None,
        special: SpecialTokens = NONE_SPECIAL,
    ) -> None:
        self._tokenizer = special.open(tokenizer_file)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.post_processor = None  # some cut the blanks off the offsets; none is part of a shard's identity
        self._dtype = dtype
        self._segmenters = dict(segmenters or {})
        self._needs_words = None in self._segmenters.values()
        self._needs_spans = any(self._segmenters.values())
        self._blank_ids = _blank_ids(self._tokenizer)
        self._counter = TokenCounter(special, self._tokenizer)

    def encode(self, texts: Sequence[str], tally: TokenTally | None = None) -> list[EncodedText]:
        """Compute the ids of each of the texts (at least one), and where words and sentences start in it.

        Args:
            tally: where special and unknown tokens are counted.
        """
        ids, words, spans = [], [], []
        token_counts, before = [0] * len(texts), 0
        for number, begin, piece, encoding in self._encode_pieces(texts):
            ids.append(np.array(encoding.ids, self._dtype))
            if self._needs_words:
                words.append(_first_of_words(encoding))
                words[-1][:1] = not begin or not self._goes_on(texts[number], begin)
            if self._needs_spans:
                spans.append(_spans(encoding) + before)
            token_counts[number] += len(encoding)
            before += len(piece)
        joined, borders = np.concatenate(ids), np.cumsum([0, *token_counts])
        if tally is not None:
            self._counter.count(texts, joined, borders, tally)
        starts = {}
        for mark, segmenter in self._segmenters.items():
            if segmenter is None:
                starts[mark] = np.concatenate(words)
            else:
                starts[mark] = self._align(_offsets(segmenter, texts), joined, np.concatenate(spans), borders)
        return [
            EncodedText(joined[begin:end], {mark: bits[begin:end] for mark, bits in starts.items()})
            for begin, end in pairwise(borders)
        ]

    def _encode_pieces(self, texts: Sequence[str]) -> Iterator[tuple[int, int, str, Encoding]]:
        """Tokenize each piece, and give it with the number of its text and its offset in that."""
        if sum(map(len, texts)) <= 2 * BATCH_CHARACTERS:
            for number, (text, encoding) in enumerate(zip(texts, self._encode_batch(texts), strict=True)):
                yield number, 0, text, encoding
            return
        for number, text in enumerate(texts):
            begin = 0
            for piece in split_text(text, BATCH_CHARACTERS):
                yield number, begin, piece, self._encode_batch([piece])[0]
                begin += len(piece)

    def _encode_batch(self, texts: Sequence[str]) -> list[Encoding]:
        # encode_batch_fast has neither offsets nor words.
        encode = self._tokenizer.encode_batch if self._segmenters else self._tokenizer.encode_batch_fast
        return encode(list(texts), add_special_tokens=False)

    def _goes_on(self, text: str, cut: int) -> bool:
        """Tell whether a word of the pre-tokenizer goes on across a cut, as the text on both sides of it shows."""
        first = max(0, cut - _CONTEXT_CHARACTERS)
        (encoding,) = self._encode_batch([text[first : cut + _CONTEXT_CHARACTERS]])
        begins, ends = _spans(encoding).T + first
        after, words = int(np.searchsorted(ends, cut, side="right")), encoding.word_ids
        if after == len(ends):
            return False
        return bool(begins[after] < cut) or (after > 0 and words[after - 1] == words[after])

    def _align(self, offsets: np.ndarray, ids: np.ndarray, spans: np.ndarray, borders: np.ndarray) -> np.ndarray:
        """Mark the token that each segment starts with, and the first one of each text: bool [n].

        That is the first one that ends after the segment's offset: the one whose span of characters holds it, the
        first of several that share a character, or, where a normalizer has dropped that character, the next one.
        A token that is nothing but a blank goes with the word after it, as in " word" it would.

        Args:
            offsets: int64, where segments start, in characters of all texts one after another.
            ids: [n], those of all texts.
            spans: int64 [n, 2], the characters [begin, end) of each token, of all texts one after another; neither
                begins nor ends ever fall.
            borders: int64 [texts + 1], the number of the first token of each text, and n.
        """
        begins, ends = spans.T
        places = np.searchsorted(ends, offsets, side="right")
        offsets, places = offsets[places < len(ids)], places[places < len(ids)]
        starts = np.zeros(len(ids) + 1, bool)
        starts[borders] = True
        if self._blank_ids:
            after_blank = ~starts[places] & np.isin(ids[places - 1], self._blank_ids)
            places = places - (after_blank & (begins[places] == offsets))
        starts[places] = True
        return starts[:-1]


def _first_of_words(encoding: Encoding) -> np.ndarray:
    """Mark where the pre-tokenizer's word is another than that of the token before: bool [n]."""
    starts = np.ones(len(encoding), bool)
    words = np.array(encoding.word_ids, np.int64)
    np.not_equal(words[1:], words[:-1], out=starts[1:])
    return starts


def _offsets(segmenter: Segmenter, texts: Sequence[str]) -> np.ndarray:
    """Find where the segments of all texts start, in characters of the texts one after another: int64."""
    found, before = [], 0
    for text in texts:
        found.append(segmenter(text) + before)
        before += len(text)
    return np.concatenate(found)


def _spans(encoding: Encoding) -> np.ndarray:
    """Find the characters of the text, as it was before normalization, that each token stands for: int64 [n, 2]."""
    return np.fromiter(chain.from_iterable(encoding.offsets), np.int64, 2 * len(encoding)).reshape(-1, 2)


def _blank_ids(tokenizer: Tokenizer) -> list[int]:
    ids = [token for token in map(tokenizer.token_to_id, _BLANKS) if token is not None]
    return [token for token in ids if not tokenizer.decode([token]).strip()]  # elsewhere Ġ is a letter


def split_text(text: str, limit: int) -> Iterator[str]:
    """Cut a long text into pieces of at most `limit` characters, before single spaces or line ends if there are any."""
    start = 0
    while len(text) - start > limit:
        cut = _word_start(text, start + limit // 2, start + limit)
        yield text[start:cut]
        start = cut
    yield text[start:]


def _word_start(text: str, low: int, high: int) -> int:
    for blank in (" ", "\n"):
        place = text.rfind(blank, low, high)
        while place > low:
            if not text[place - 1].isspace() and not text[place + 1].isspace():
                return place
            place = text.rfind(blank, low, place)
    return high
