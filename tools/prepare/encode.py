"""Texts to token ids, in batches, with plain `tokenizers` in one thread: a process a core scales better."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from tokenizers import Tokenizer

BATCH_CHARACTERS = 1 << 20
BATCH_DOCUMENTS = 512


class Encoder:
    """A tokenizer that treats every text as text.

    No special token is added, and a literal "</s>" or "<mask>" in a text does not become the special id. A text
    of more than a million characters is encoded in pieces, cut where a word starts: `tokenizers` needs about a
    hundred bytes a character, and a text of gigabytes should not need hundreds of them.
    """

    def __init__(self, tokenizer_file: str, dtype: np.dtype) -> None:
        self._tokenizer = Tokenizer.from_file(tokenizer_file)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True
        self._dtype = dtype

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, in the dtype given to the constructor."""
        if sum(map(len, texts)) <= 2 * BATCH_CHARACTERS:
            return self._encode_batch(texts)
        return [
            np.concatenate([self._encode_batch([part])[0] for part in split_text(text, BATCH_CHARACTERS)])
            for text in texts
        ]

    def _encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, self._dtype) for encoding in encodings]


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
