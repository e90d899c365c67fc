"""Data for benchmarks: shards of random tokens, a tokenizer that fits them, and tokens that can be learnt.

What the tokens are does not change the work of reading and masking them.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from trainer.data.manifest import MANIFEST, WORD_STARTS, Manifest, token_dtype
from trainer.data.shard_writer import ShardWriter
from trainer.runtime.files import replace_synced

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCABULARY_SIZE = 50_265  # RoBERTa's
SHARD_BYTES = 64_000_000
DOCUMENT_TOKENS = 4096
WORDS_A_TOKEN = 0.75  # as in English text with a vocabulary of 50,000
_SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
_SEPARATOR_ID = _SPECIAL_TOKENS.index("</s>")


def write_random_shards(
    folder: Path, size_bytes: int, vocabulary_size: int = VOCABULARY_SIZE, words: bool = False
) -> None:
    """Write a data set of about `size_bytes` bytes of tokens, uniform over the ordinary vocabulary.

    Args:
        words: mark where words start: at three tokens of four.
    """
    dtype = token_dtype(vocabulary_size)
    generator = np.random.default_rng(0)
    documents = max(1, size_bytes // (DOCUMENT_TOKENS * dtype.itemsize))
    per_shard = max(1, SHARD_BYTES // (DOCUMENT_TOKENS * dtype.itemsize))
    entries = []
    for first in range(0, documents, per_shard):
        marks = (WORD_STARTS,) if words else ()
        writer = ShardWriter(folder, f"shard-{len(entries):05d}", dtype, _SEPARATOR_ID, marks)
        for _ in range(min(per_shard, documents - first)):
            ids = generator.integers(len(_SPECIAL_TOKENS), vocabulary_size, DOCUMENT_TOKENS - 1, dtype=np.uint32)
            starts = generator.random(len(ids)) < WORDS_A_TOKEN
            starts[0] = True
            writer.add_document(ids, dict.fromkeys(marks, starts))
        entries.append(writer.close())
    manifest = Manifest(
        dtype=dtype.str,
        tokenizer_sha256="",
        vocabulary_size=vocabulary_size,
        separator_id=_SEPARATOR_ID,
        tokens=sum(entry.tokens for entry in entries),
        documents=documents,
        shards=tuple(entries),
        written_by=f"maskwright {version('maskwright')}",
    )
    replace_synced(folder / MANIFEST, manifest.to_json().encode())


def make_tokenizer(vocabulary_size: int) -> PreTrainedTokenizerFast:
    """Make a tokenizer with `vocabulary_size` ids, of which the first five are special as in RoBERTa."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = [*_SPECIAL_TOKENS, *(f"word-{number}" for number in range(len(_SPECIAL_TOKENS), vocabulary_size))]
    begin, pad, end, unknown, mask = _SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unknown)),
        cls_token=begin,
        pad_token=pad,
        sep_token=end,
        unk_token=unknown,
        mask_token=mask,
    )


def learnable_tokens(blocks: int, length: int, seed: int, vocabulary_size: int = VOCABULARY_SIZE) -> NDArray[np.int64]:
    """Make tokens [blocks, length] that a model can learn something of: words of Zipf's frequencies, in pairs.

    Token i has a frequency of 1 / (i + 1); every other token follows from the one before it.
    """
    generator = np.random.default_rng(seed)
    ordinary = vocabulary_size - len(_SPECIAL_TOKENS)
    cumulative = np.cumsum(1 / np.arange(1, ordinary + 1))
    drawn = np.searchsorted(cumulative, generator.random((blocks, length)) * cumulative[-1])
    drawn[:, 1::2] = (drawn[:, 0 : length // 2 * 2 : 2] * 7919 + 1) % ordinary
    return drawn + len(_SPECIAL_TOKENS)
