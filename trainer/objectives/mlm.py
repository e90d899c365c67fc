"""Masked language modelling: masked batches of blocks.

BERT (arXiv:1810.04805) with the dynamic masks of RoBERTa (arXiv:1907.11692): a block is masked anew each
time it is seen in training.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from trainer.config import ObjectiveConfig
from trainer.data.batch import Batch, Documents
from trainer.data.blocks import DOCUMENT_STARTS, Blocks, framed_view
from trainer.data.documents import cumulative_lengths, length_counts, positions_in_documents
from trainer.data.manifest import WORD_STARTS
from trainer.data.tokenizer import Vocabulary
from trainer.objectives.masking import Masking, predictions_per_block
from trainer.objectives.objective import ObjectiveCard
from trainer.objectives.units import LENGTHS
from trainer.schedule.mask_ratio import Stages

TERM = "mlm"
_MASKED_AS = {
    "token": "",
    "word": " in whole words",
    "ngram": " in n-grams of whole words",
    "span": " in spans of whole words",
}


def _described(settings: Mapping[str, Any]) -> str:
    mask, drawn = settings["replace_mask"], settings["replace_random"]
    replaced = f"{mask:.0%} mask, {drawn:.0%} random, {1 - mask - drawn:.0%} kept"
    ratios = ObjectiveConfig(**settings).mask_ratios
    shares = ", then ".join(f"{ratio:.0%}" for _, ratio in ratios)
    share = f"{shares} of tokens{_MASKED_AS[settings['scheme']]}"
    return f"mlm, {share} ({replaced}), new masks at each visit"


CARD = ObjectiveCard(
    tags=("fill-mask", "masked-lm"),
    settings=_described,
    results={
        "eval/perplexity": ("validation perplexity of masked tokens", ".2f"),
        "eval/masked_accuracy": ("masked tokens predicted right", ".1%"),
    },
    use="""\
from transformers import pipeline

fill = pipeline("fill-mask", model="PATH_OF_THIS_FOLDER")
print(fill(f"The capital of France is {fill.tokenizer.mask_token}."))""",
)


class MaskedSamples:
    """Masks blocks between a begin and an end token; see `trainer.data.batch.Samples`.

    Args:
        document_attention: whether batches tell where documents begin.
        ratios: share of the content tokens that is predicted, by sample; default the first of the settings throughout.
    """

    def __init__(
        self,
        settings: ObjectiveConfig,
        vocabulary: Vocabulary,
        seq_len: int,
        document_attention: bool = False,
        ratios: Stages | None = None,
    ) -> None:
        self.vocabulary, self.seq_len, self.view = vocabulary, seq_len, framed_view(seq_len)
        whole_words = settings.scheme != "token"
        self.marks = (*((DOCUMENT_STARTS,) if document_attention else ()), *((WORD_STARTS,) if whole_words else ()))
        (_, first), *later = ratios or settings.mask_ratios[:1]
        counts = {predictions_per_block(ratio, self.view.payload) for ratio in (first, *(ratio for _, ratio in later))}
        self.head_rows = max(counts)
        self.shape_count = len(counts) * (length_counts(seq_len) if document_attention else 1)
        self.masking = Masking(
            mask_ratio=first,
            later=tuple(later),
            replace_mask=settings.replace_mask,
            replace_random=settings.replace_random,
            mask_id=vocabulary.mask_id,
            vocabulary_size=vocabulary.size,
            special_ids=(*vocabulary.special_ids, *vocabulary.unused_ids),
            lengths=tuple(settings.lengths or LENGTHS[settings.scheme]),
            by_unit=settings.replace_by == "unit",
        )

    def frame(self, tokens: np.ndarray) -> np.ndarray:
        """Put the begin and end tokens around tokens [B, payload]; returns int64 [B, seq_len]."""
        framed = np.empty((len(tokens), self.seq_len), np.int64)
        framed[:, 0], framed[:, -1] = self.vocabulary.begin_id, self.vocabulary.end_id
        framed[:, 1:-1] = tokens
        return framed

    def make_batch(self, blocks: Blocks, samples: np.ndarray, seed: int) -> Batch:
        """Mask blocks; see `Samples.make_batch`."""
        words = blocks.starts.get(WORD_STARTS)
        word_starts = None if words is None else self._frame_starts(words)
        return self._batch(blocks, *self.masking.apply(self.frame(blocks.tokens), samples, seed, word_starts))

    def plain(self, blocks: Blocks) -> Batch:
        """Show blocks as they are; see `Samples.plain`."""
        tokens = self.frame(blocks.tokens)
        row = np.linspace(0, self.seq_len - 1, self.head_rows).astype(np.int64)
        index = (np.arange(len(tokens))[:, None] * self.seq_len + row).reshape(-1)
        return self._batch(blocks, tokens, index, tokens.reshape(-1)[index])

    def _frame_starts(self, starts: np.ndarray) -> np.ndarray:
        """Put the places of the begin and end tokens around starts [B, payload]; they start nothing."""
        framed = np.zeros((len(starts), self.seq_len), np.bool_)
        framed[:, 1:-1] = starts
        return framed

    def _batch(self, blocks: Blocks, input_ids: np.ndarray, index: np.ndarray, labels: np.ndarray) -> Batch:
        starts = blocks.starts.get(DOCUMENT_STARTS)
        return Batch(
            inputs={"input_ids": torch.from_numpy(input_ids)},
            labels={TERM: torch.from_numpy(labels)},
            prediction_index=torch.from_numpy(index),
            documents=None if starts is None else self._documents(starts),
        )

    def _documents(self, starts: np.ndarray) -> Documents:
        """Frame the documents: the begin token belongs to a block's first document, the end token to its last."""
        framed = self._frame_starts(starts)
        framed[:, 0], framed[:, 1] = True, False
        return Documents(
            positions=torch.from_numpy(positions_in_documents(framed)),
            cu_seqlens=torch.from_numpy(cumulative_lengths(framed)),
        )
