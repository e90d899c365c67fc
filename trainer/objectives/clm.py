"""Causal language modelling: each token is predicted from those before it (GPT-2, Radford et al. 2019).

A block shows S tokens and predicts the S that follow each of them, the last one read beyond its end. So one pass over
the data predicts each token of the stream once, but for its first. Where the loss is computed in transformers, labels
are shifted within a block, and one prediction a block is lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from trainer.data.batch import Batch, Documents
from trainer.data.blocks import DOCUMENT_STARTS, IGNORED_LABEL, Blocks, View, framed_view
from trainer.data.documents import length_counts
from trainer.data.tokenizer import Vocabulary
from trainer.objectives.framing import Framed, frame_block, frame_documents
from trainer.objectives.objective import ObjectiveCard

TERM = "clm"
ACCURACY = ("eval/accuracy", "accuracy")


def view_of(seq_len: int, whole_documents: bool) -> View:
    """Make the view of S tokens and the one after them or, of rows of whole documents, the usual one."""
    return framed_view(seq_len, True) if whole_documents else View(seq_len, lookahead=1)


def _described(settings: Mapping[str, Any], tokens: int) -> str:
    return "clm, every token predicted from those before it in its block"


CARD = ObjectiveCard(
    tags=("text-generation", "causal-lm"),
    settings=_described,
    results={
        "eval/perplexity": ("validation perplexity", ".2f"),
        "eval/accuracy": ("tokens predicted right", ".1%"),
    },
    use="""\
from transformers import pipeline

generate = pipeline("text-generation", model="PATH_OF_THIS_FOLDER")
print(generate("Once upon a time", max_new_tokens=50)[0]["generated_text"])""",
)


class CausalSamples:
    """Blocks of the stream, each token's label the next one; see `trainer.data.batch.Samples`.

    With attention within documents, a document begins with the separator before it: that one predicts its first token,
    as a begin token does. Rows of whole documents have their own begin and end tokens; nothing follows an end. A piece
    of a document that goes on in the next row predicts the first token there in the place of an end, and its end token
    is nobody's. A piece that goes on from the row before has its begin token apart, as a document of its own.

    Args:
        document_attention: whether batches tell where documents begin.
        whole_documents: whether blocks are rows of whole documents, each with attention of its own.

    """

    def __init__(
        self, vocabulary: Vocabulary, seq_len: int, document_attention: bool = False, whole_documents: bool = False
    ) -> None:
        self.vocabulary, self.seq_len, self.head_rows = vocabulary, seq_len, seq_len
        self.view = view_of(seq_len, whole_documents)
        document_attention = document_attention or whole_documents
        self.marks: tuple[str, ...] = (DOCUMENT_STARTS,) if document_attention else ()
        self.shape_count = length_counts(seq_len) if document_attention else 1

    def make_batch(self, blocks: Blocks, samples: np.ndarray, seed: int) -> Batch:
        """Show blocks and label each token with the next; see `Samples.make_batch`. Nothing is drawn."""
        return self._of_documents(blocks) if self.view.whole_documents else self.plain(blocks)

    def plain(self, blocks: Blocks) -> Batch:
        """Show equal stretches of the stream; see `Samples.plain`."""
        if self.view.whole_documents:
            framed = frame_block(blocks, self.vocabulary)
            labels = np.append(framed.tokens[:, 1:], np.full((len(framed.tokens), 1), IGNORED_LABEL), axis=1)
            return _batch(framed.tokens, labels, framed.starts.get(DOCUMENT_STARTS))
        tokens = np.asarray(blocks.tokens, np.int64)
        return _batch(tokens[:, :-1], tokens[:, 1:], self._starts(blocks))

    def document_starts(self, blocks: Blocks) -> np.ndarray:
        """Find where documents begin; see `Samples.document_starts`."""
        if self.view.whole_documents:
            return self._framed(blocks).starts[DOCUMENT_STARTS]
        starts = self._starts(blocks)
        assert starts is not None
        return starts

    def _starts(self, blocks: Blocks) -> np.ndarray | None:
        """Move the starts of documents to the separators before them: bool [B, S]."""
        if (starts := blocks.starts.get(DOCUMENT_STARTS)) is None:
            return None
        starts = starts[:, 1:].copy()
        starts[:, 0] = True
        return starts

    def _framed(self, blocks: Blocks) -> Framed:
        assert blocks.cuts is not None
        framed = frame_documents(blocks, self.vocabulary)
        framed.starts[DOCUMENT_STARTS][blocks.cuts[:, 0], 1] = True
        return framed

    def _of_documents(self, blocks: Blocks) -> Batch:
        framed = self._framed(blocks)
        assert blocks.cuts is not None
        starts = framed.starts[DOCUMENT_STARTS]
        has_next = np.arange(self.seq_len) < framed.lengths[:, None] - 1
        has_next &= ~np.roll(starts, -1, axis=1)  # nothing follows an end token
        labels = np.where(has_next, np.roll(framed.tokens, -1, axis=1), IGNORED_LABEL)
        goes_on = np.flatnonzero(blocks.cuts[:, 1])  # it fills its row: the next token is the last that was read
        labels[goes_on, self.seq_len - 2] = blocks.tokens[goes_on, self.view.payload]
        return _batch(framed.tokens, labels, starts)


def _batch(shown: np.ndarray, labels: np.ndarray, starts: np.ndarray | None) -> Batch:
    return Batch(
        inputs={"input_ids": torch.from_numpy(np.ascontiguousarray(shown))},
        labels={TERM: torch.from_numpy(np.ascontiguousarray(labels).reshape(-1))},
        prediction_index=None,
        documents=None if starts is None else Documents.of(starts),
    )
