"""Masked language modelling: masked batches from blocks, and the loss over the predicted positions.

BERT (arXiv:1810.04805) with the dynamic masks of RoBERTa (arXiv:1907.11692): a block is masked anew each
time it is seen.
"""

from __future__ import annotations

import numpy as np
import torch

from trainer.config import ObjectiveConfig
from trainer.data.batch import Batch, Documents, Network
from trainer.data.documents import cumulative_lengths, positions_in_documents
from trainer.data.tokenizer import Vocabulary
from trainer.objectives.cross_entropy import CrossEntropies, cross_entropies
from trainer.objectives.masking import IGNORED_LABEL, TokenMasking, predictions_per_block


class MaskedLanguageModelling:
    """Builds batches (in loader workers) and computes the loss (in the training process).

    Attributes:
        cross_entropies: what computes the losses of training; another kernel may be put in its place.
    """

    def __init__(self, settings: ObjectiveConfig, vocabulary: Vocabulary, seq_len: int) -> None:
        self.vocabulary = vocabulary
        self.seq_len = seq_len
        self.payload = seq_len - 2
        self.cross_entropies: CrossEntropies = cross_entropies
        self.predictions_per_block = predictions_per_block(settings.mask_ratio, self.payload)
        self.masking = TokenMasking(
            mask_ratio=settings.mask_ratio,
            replace_mask=settings.replace_mask,
            replace_random=settings.replace_random,
            mask_id=vocabulary.mask_id,
            vocabulary_size=vocabulary.size,
            special_ids=(*vocabulary.special_ids, *vocabulary.unused_ids),
        )

    def frame(self, blocks: np.ndarray) -> np.ndarray:
        """Put the begin and end tokens around blocks [B, payload]; returns int64 [B, seq_len]."""
        tokens = np.empty((len(blocks), self.seq_len), np.int64)
        tokens[:, 0], tokens[:, -1] = self.vocabulary.begin_id, self.vocabulary.end_id
        tokens[:, 1:-1] = blocks
        return tokens

    def frame_starts(self, starts: np.ndarray) -> np.ndarray:
        """Document starts of framed blocks, bool [B, seq_len], from those of their content [B, payload].

        The begin token belongs to a block's first document, the end token to its last.
        """
        framed = np.zeros((len(starts), self.seq_len), np.bool_)
        framed[:, 1:-1] = starts
        framed[:, 0], framed[:, 1] = True, False
        return framed

    def make_batch(self, blocks: np.ndarray, samples: np.ndarray, seed: int, starts: np.ndarray | None = None) -> Batch:
        """Mask blocks.

        Args:
            blocks: [B, payload], any integer dtype.
            samples: uint64 [B], the sample numbers t that key the masks.
            seed: of the run.
            starts: bool [B, payload], True where a document begins; None for attention across documents.
        """
        input_ids, index, labels = self.masking.apply(self.frame(blocks), samples, seed)
        batch = Batch(
            input_ids=torch.from_numpy(input_ids),
            prediction_index=torch.from_numpy(index),
            labels=torch.from_numpy(labels),
        )
        if starts is not None:
            batch["documents"] = self._documents(starts)
        return batch

    def _documents(self, starts: np.ndarray) -> Documents:
        framed = self.frame_starts(starts)
        return Documents(
            positions=torch.from_numpy(positions_in_documents(framed)),
            cu_seqlens=torch.from_numpy(cumulative_lengths(framed)),
        )

    @staticmethod
    def leave_out(batch: Batch, rows: np.ndarray) -> None:
        """Make padding of some blocks: without predictions they count in no loss. `rows` is bool [B]."""
        batch["labels"].view(len(rows), -1)[torch.from_numpy(rows)] = IGNORED_LABEL

    @staticmethod
    def predictions(batch: Batch) -> int:
        """How many predictions of the batch count in the loss."""
        return int((batch["labels"] != IGNORED_LABEL).sum())

    @staticmethod
    def predictions_by_source(batch: Batch, source_count: int) -> np.ndarray:
        """int64 [source_count]: the predictions of each source, for a batch that has `sources`."""
        sources = batch.get("sources")
        assert sources is not None
        counts = (batch["labels"] != IGNORED_LABEL).view(len(sources), -1).sum(dim=1)
        return np.bincount(sources.numpy(), counts.numpy(), source_count).astype(np.int64)

    @staticmethod
    def to_device(batch: Batch, device: torch.device) -> Batch:
        """Copy to the device, without waiting where the batch is pinned."""
        moved = Batch(
            input_ids=batch["input_ids"].to(device, non_blocking=True),
            prediction_index=batch["prediction_index"].to(device, non_blocking=True),
            labels=batch["labels"].to(device, non_blocking=True),
        )
        if "sources" in batch:
            moved["sources"] = batch["sources"].to(device, non_blocking=True)
        if "documents" in batch:
            moved["documents"] = Documents(*(tensor.to(device, non_blocking=True) for tensor in batch["documents"]))
        return moved

    def loss_sums(self, network: Network, batch: Batch, source_count: int) -> torch.Tensor:
        """Sums of the cross-entropies over the predictions of each source, in nats; [source_count] in fp32."""
        logits = network(batch["input_ids"], batch["prediction_index"], batch.get("documents"))
        losses = self.cross_entropies(logits, batch["labels"])
        if "sources" not in batch:
            return losses.sum().view(1)
        losses = losses.view(len(batch["sources"]), -1)
        # A product with 0 and 1 instead of a scattered sum, whose order is not fixed on CUDA.
        of_source = batch["sources"][:, None] == torch.arange(source_count, device=losses.device)
        return (losses.sum(dim=1, keepdim=True) * of_source).sum(dim=0)

    @torch.no_grad()
    def score(self, network: Network, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """For evaluation: the loss sum, and how many predictions were right; scalars."""
        logits = network(batch["input_ids"], batch["prediction_index"], batch.get("documents"))
        right = (logits.argmax(dim=-1) == batch["labels"]).sum()
        return cross_entropies(logits, batch["labels"]).sum(), right
