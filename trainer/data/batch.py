"""Micro-batches, and the protocol of what makes them of blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch

from trainer.data.blocks import IGNORED_LABEL, Blocks, View
from trainer.data.documents import cumulative_lengths, positions_in_documents

RANKS = "ranks"
"""Of `Batch.inputs`, int64 [B, S]: the place of each predicted token in the order in which a block's are predicted, 0
first, and −1 for the others. `trainer.model.two_streams` makes of it what the model's forward takes."""


DRAWS = "draws"
"""Of `Batch.inputs`, fp32 [B, k]: a number in [0, 1) for each prediction of a block, by which a token is drawn of those
that a generator predicts there; −1 where nothing is predicted."""


class Documents(NamedTuple):
    """The documents of B blocks of S tokens, for attention within them.

    Attributes:
        positions: int64 [B, S], the distance of each token from the start of its document.
        cu_seqlens: int32 [n + 1], where documents begin in the flattened B·S, and B·S to the end.
    """

    positions: torch.Tensor
    cu_seqlens: torch.Tensor

    @classmethod
    def of(cls, starts: np.ndarray) -> Documents:
        """Make them of where they begin: bool [B, S], True at the first token of every row."""
        lengths = cumulative_lengths(starts)
        return cls(torch.from_numpy(positions_in_documents(starts)), torch.from_numpy(lengths))


class Score(NamedTuple):
    """What is wanted in the place of logits.

    Attributes:
        function: (logits [n, V], rows …) → [n, c] in fp32, each row of its own rows alone. The same object for a whole
            run, or a compiled model is compiled anew.
        rows: what the function is given beside the logits, such as labels: each [N, …], for the rows in their order.
    """

    function: Callable[..., torch.Tensor]
    rows: tuple[torch.Tensor, ...]


@dataclass
class Batch:
    """One micro-batch of B blocks of S tokens. Its shapes do not depend on what the blocks hold, but for `cu_seqlens`.

    Attributes:
        inputs: arguments of the model's forward, int64; `input_ids` [B, S] is always there. And `RANKS`, where tokens
            are predicted one after the other, and `DRAWS`, where some are drawn.
        labels: name of a term of the loss → int64 [B·n], those of a block together; IGNORED_LABEL where nothing counts.
        prediction_index: int64 [B·k], flat positions into B·S, for which logits of the vocabulary are computed; None
            for all of them.
        sources: int64 [B], number of the source of each block; the loader sets it in a run that mixes several.
        documents: only in a run with attention within documents.
    """

    inputs: dict[str, torch.Tensor]
    labels: dict[str, torch.Tensor]
    prediction_index: torch.Tensor | None
    sources: torch.Tensor | None = None
    documents: Documents | None = None

    @property
    def rows(self) -> int:
        """B."""
        return len(self.inputs["input_ids"])

    @property
    def head_rows(self) -> int:
        """For how many positions logits of the vocabulary are computed."""
        return self.inputs["input_ids"].numel() if self.prediction_index is None else len(self.prediction_index)

    @property
    def shapes(self) -> tuple[int, ...]:
        """The lengths that may differ from batch to batch; equal ones mean equal shapes of all tensors."""
        borders = 0 if self.documents is None else len(self.documents.cu_seqlens)
        return *self.inputs["input_ids"].shape, self.head_rows, borders

    def to(self, device: torch.device) -> Batch:
        """Copy to the device, without waiting where the batch is pinned."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Copy into pinned memory; torch's DataLoader calls it."""
        return self._each(torch.Tensor.pin_memory)

    def count(self, term: str) -> int:
        """Count the labels of a term that count in the loss."""
        return int((self.labels[term] != IGNORED_LABEL).sum())

    def count_by_source(self, term: str, source_count: int) -> np.ndarray:
        """Count them by source: int64 [source_count]; for a batch that has `sources`."""
        assert self.sources is not None
        counts = (self.labels[term] != IGNORED_LABEL).view(self.rows, -1).sum(dim=1)
        return np.bincount(self.sources.numpy(), counts.numpy(), source_count).astype(np.int64)

    def leave_out(self, rows: np.ndarray) -> None:
        """Ignore all labels of some blocks, so that they add nothing to the loss. `rows` is bool [B]."""
        for labels in self.labels.values():
            labels.view(len(rows), -1)[torch.from_numpy(rows)] = IGNORED_LABEL

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        return Batch(
            inputs={name: change(tensor) for name, tensor in self.inputs.items()},
            labels={name: change(tensor) for name, tensor in self.labels.items()},
            prediction_index=None if self.prediction_index is None else change(self.prediction_index),
            sources=None if self.sources is None else change(self.sources),
            documents=None if self.documents is None else Documents(*map(change, self.documents)),
        )


class Samples(Protocol):
    """What makes an objective's batches of blocks, in a loader's worker; one for each phase.

    It keeps nothing between two batches, and no tensor: it is copied into each worker. It lies here, and not with the
    objectives, because the loader may not import from the floor above.

    Attributes:
        seq_len: S, tokens of a block as the model sees it.
        view: which tokens a block is.
        marks: what has to be read beside the tokens, see `Blocks.starts`.
        head_rows: the most positions of a block for which logits of the vocabulary are computed.
        shape_count: how many shapes the batches of as many blocks may have.
    """

    seq_len: int
    view: View
    marks: tuple[str, ...]
    head_rows: int
    shape_count: int

    def make_batch(self, blocks: Blocks, samples: np.ndarray, seed: int) -> Batch:
        """Make a batch, a pure function of (seed, t, position).

        Args:
            samples: uint64 [B], the sample numbers t.
            seed: of the run.
        """
        ...

    def plain(self, blocks: Blocks) -> Batch:
        """Make a batch in which nothing is hidden from the model, predicting evenly spread positions.

        Args:
            blocks: equal stretches, also where `view` has rows. The probe of a checkpoint gives blocks without marks:
                each is then one document.
        """
        ...

    def document_starts(self, blocks: Blocks) -> np.ndarray:
        """Find where documents begin in the blocks as the model sees them, of which the tokens need not be read.

        Returns:
            bool [B, S].
        """
        ...
