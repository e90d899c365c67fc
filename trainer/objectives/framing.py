"""Puts the begin and end tokens around what a loader has read: around a block, or around each document of a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.data.blocks import DOCUMENT_STARTS, Blocks
from trainer.data.tokenizer import Vocabulary


@dataclass(frozen=True)
class Framed:
    """Blocks as the model is to see them, but for masks.

    Attributes:
        tokens: int64 [B, S].
        starts: marks of the blocks, bool [B, S]. A document starts with its begin token, and padding is one; words and
            sentences start where they did.
        contents: int64 [B], tokens of the text.
        lengths: int64 [B], tokens but for the padding at the end.
    """

    tokens: NDArray[np.int64]
    starts: Mapping[str, NDArray[np.bool_]]
    contents: NDArray[np.int64]
    lengths: NDArray[np.int64]


def frame_block(blocks: Blocks, vocabulary: Vocabulary) -> Framed:
    """Frame equal stretches of the stream, [B, S − 2]: each is between one begin and one end token.

    The begin token belongs to a block's first document, and the end token to its last.
    """
    starts = {mark: _pad(marked, 1) for mark, marked in blocks.starts.items()}
    if (documents := starts.get(DOCUMENT_STARTS)) is not None:
        documents[:, 0], documents[:, 1] = True, False
    rows, payload = blocks.tokens.shape
    contents = np.full(rows, payload)
    return Framed(frame_tokens(blocks.tokens, vocabulary), starts, contents, contents + 2)


def frame_at_end(blocks: Blocks, vocabulary: Vocabulary) -> Framed:
    """Frame equal stretches of the stream, [B, S − 2], as XLNet does: an end token and then a begin token follow each.

    There they are `<sep>` and `<cls>` (zihangdai/xlnet, data_utils.py). So position 0 of a row is text.
    """
    starts = {mark: _pad(marked, 0) for mark, marked in blocks.starts.items()}
    rows, payload = blocks.tokens.shape
    tokens = np.empty((rows, payload + 2), np.int64)
    tokens[:, :-2] = blocks.tokens
    tokens[:, -2], tokens[:, -1] = vocabulary.end_id, vocabulary.begin_id
    contents = np.full(rows, payload)
    return Framed(tokens, starts, contents, contents + 2)


def _pad(marked: NDArray[np.bool_], before: int) -> NDArray[np.bool_]:
    padded = np.zeros((len(marked), marked.shape[1] + 2), np.bool_)  # np.pad takes as long as all the rest
    padded[:, before : before + marked.shape[1]] = marked
    return padded


def frame_tokens(tokens: np.ndarray, vocabulary: Vocabulary) -> NDArray[np.int64]:
    """Put the begin and end tokens around tokens [B, payload]; int64 [B, payload + 2]."""
    framed = np.empty((len(tokens), tokens.shape[1] + 2), np.int64)
    framed[:, 0], framed[:, -1] = vocabulary.begin_id, vocabulary.end_id
    framed[:, 1:-1] = tokens
    return framed


def row_lengths(blocks: Blocks) -> NDArray[np.int64]:
    """Count what rows of whole documents show but for the padding at the end: int64 [B].

    That is a begin and an end token for each document beside its text, without the separators between them.
    """
    assert blocks.lengths is not None
    first = blocks.starts[DOCUMENT_STARTS] & (np.arange(blocks.tokens.shape[1]) < blocks.lengths[:, None])
    return blocks.lengths + first.sum(axis=1) + 1


def frame_documents(blocks: Blocks, vocabulary: Vocabulary) -> Framed:
    """Frame rows of whole documents, [B, S − 1]: each document is between a begin and an end token, then comes padding.

    In the place of the separator after a document comes its end token, so a token at place i of the stream, in the n-th
    document of its row, is at i + n of the row.
    """
    assert blocks.lengths is not None
    rows, width = blocks.tokens.shape
    shown = np.arange(width) < blocks.lengths[:, None]
    first = blocks.starts[DOCUMENT_STARTS] & shown
    number = np.cumsum(first, axis=1)
    row, place = np.nonzero(shown)
    position = place + number[row, place]
    tokens = np.full((rows, width + 1), vocabulary.filler_id, np.int64)
    tokens[row, position] = blocks.tokens[row, place]

    row_of, place_of = np.nonzero(first)
    begin = place_of + number[row_of, place_of] - 1
    end = row_lengths(blocks) - 1  # of the last document of each row
    later = place_of > 0
    tokens[row_of[later], begin[later] - 1] = vocabulary.end_id  # where the separator was
    tokens[row_of, begin] = vocabulary.begin_id
    tokens[np.arange(rows), end] = vocabulary.end_id

    starts = {}
    for mark, marked in blocks.starts.items():
        starts[mark] = np.zeros(tokens.shape, np.bool_)
        starts[mark][row, position] = marked[row, place]
    documents = starts[DOCUMENT_STARTS] = np.zeros(tokens.shape, np.bool_)
    documents[row_of, begin] = True
    padded = np.flatnonzero(end < width)
    documents[padded, end[padded] + 1] = True
    return Framed(tokens, starts, blocks.lengths - first.sum(axis=1) + 1, end + 1)
