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
from trainer.data.blocks import DOCUMENT_STARTS, Blocks, View, framed_view
from trainer.data.documents import length_counts
from trainer.data.manifest import WORD_STARTS
from trainer.data.tokenizer import BEGIN, END, Vocabulary, need_tokens
from trainer.objectives.framing import Framed, frame_block, frame_documents
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


def _described(settings: Mapping[str, Any], tokens: int) -> str:
    return f"mlm, {share_of_tokens(settings, tokens)} ({shown_instead(settings)}), new masks at each visit"


def shown_instead(settings: Mapping[str, Any]) -> str:
    """Say for a model card what is shown in the place of predicted tokens."""
    mask, drawn = settings["replace_mask"], settings["replace_random"]
    return f"{mask:.0%} mask, {drawn:.0%} random, {1 - mask - drawn:.0%} kept"


def share_of_tokens(settings: Mapping[str, Any], tokens: int) -> str:
    """Say for a model card which share of the tokens was predicted, and in which units.

    Args:
        settings: the section `objective` of the run's config.
        tokens: positions trained on.
    """
    ratios = ObjectiveConfig(mask_ratio=settings["mask_ratio"]).mask_ratios
    (_, first), *later = [stage for stage in ratios if stage[0] < max(1, tokens)]
    changes = "".join(f", {100 * ratio:.3g}% from token {start:,} on" for start, ratio in later)
    return f"{100 * first:.3g}% of tokens{_MASKED_AS[settings['scheme']]}{changes}"


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
    """Masks blocks between begin and end tokens; see `trainer.data.batch.Samples`.

    Args:
        document_attention: whether batches tell where documents begin.
        whole_documents: whether blocks are rows of whole documents, each with attention of its own.
        ratios: share of the content tokens that is predicted, by sample; default the first of the settings throughout.
        view: which tokens a block is; default all but a begin and an end token.

    Raises:
        UserError: when the tokenizer lacks a mask, padding, begin or end token.
    """

    def __init__(
        self,
        settings: ObjectiveConfig,
        vocabulary: Vocabulary,
        seq_len: int,
        document_attention: bool = False,
        whole_documents: bool = False,
        ratios: Stages | None = None,
        view: View | None = None,
    ) -> None:
        # Padding is never in a block of the stream, but stock classes take id 0 for it when it is not set.
        need_tokens(vocabulary, ("mask", "pad", BEGIN, END))
        assert vocabulary.mask_id is not None
        self.vocabulary, self.seq_len = vocabulary, seq_len
        self.view = view or framed_view(seq_len, whole_documents)
        self._frame = frame_documents if whole_documents else frame_block
        document_attention = document_attention or whole_documents
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

    def make_batch(self, blocks: Blocks, samples: np.ndarray, seed: int) -> Batch:
        """Mask blocks; see `Samples.make_batch`."""
        return self.mask(self.frame(blocks), samples, seed)

    def mask(self, framed: Framed, samples: np.ndarray, seed: int) -> Batch:
        """Mask blocks that are framed."""
        words = framed.starts.get(WORD_STARTS)
        masked = self.masking.apply(framed.tokens, samples, seed, words, framed.contents)
        return _batch(*masked, framed.starts.get(DOCUMENT_STARTS))

    def frame(self, blocks: Blocks) -> Framed:
        """Put begin and end tokens where the model is to see them."""
        return self._frame(blocks, self.vocabulary)

    def plain(self, blocks: Blocks) -> Batch:
        """Show blocks as they are; see `Samples.plain`."""
        framed = frame_block(blocks, self.vocabulary)
        return _batch(framed.tokens, *self.evenly_spread(framed.tokens), framed.starts.get(DOCUMENT_STARTS))

    def evenly_spread(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Spread as many predictions as there are in training over rows [B, S]: index and labels, int64 [B·k]."""
        row = np.linspace(0, self.seq_len - 1, self.head_rows).astype(np.int64)
        index = (np.arange(len(tokens))[:, None] * self.seq_len + row).reshape(-1)
        return index, tokens.reshape(-1)[index]

    def document_starts(self, blocks: Blocks) -> np.ndarray:
        """Find where documents begin; see `Samples.document_starts`."""
        return self.frame(blocks).starts[DOCUMENT_STARTS]


def _batch(input_ids: np.ndarray, index: np.ndarray, labels: np.ndarray, documents: np.ndarray | None) -> Batch:
    return Batch(
        inputs={"input_ids": torch.from_numpy(input_ids)},
        labels={TERM: torch.from_numpy(labels)},
        prediction_index=torch.from_numpy(index),
        documents=None if documents is None else Documents.of(documents),
    )
