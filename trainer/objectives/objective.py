"""What a loss is: terms, each with a count of its own over the global batch.

    loss = Σ weightⱼ · sumⱼ / countⱼ

Sums and counts are those of all micro-batches and ranks of a step, so the loss does not depend on the layout. The
counts are known from the labels before the first forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from trainer.data.batch import Batch, Documents, Score
from trainer.data.blocks import IGNORED_LABEL


class Network(Protocol):
    """What runs a model: see `trainer.model.forward.Forward`."""

    def __call__(
        self,
        inputs: Mapping[str, torch.Tensor],
        prediction_index: torch.Tensor | None,
        documents: Documents | None = None,
        score: Score | None = None,
        with_states: bool = False,
    ) -> Any:
        """Return the model's output for the inputs of a batch, its `logits` [n, V] or, with `score`, [n, c].

        Of a class with a head for pairs it has `pair_logits` [B, 2] as well, and `states` [B, S, H] if they are wanted.
        """
        ...


class Term(NamedTuple):
    """A part of the loss, with the labels of this name; `one_a_block` where each block has one, that may be ignored.

    `has_answers` is False of a distance, for which nothing is right or wrong: its labels say only where it counts.
    `ahead` says how many tokens after its place the token stands that a label is; None where labels are no tokens.
    """

    name: str
    weight: float
    one_a_block: bool = False
    has_answers: bool = True
    ahead: int | None = None


@dataclass(frozen=True)
class Predicted:
    """What a model has made of the labels of a term.

    Attributes:
        losses: fp32 [B·n], nats; 0 where a label is ignored.
        guesses: int64 [B·n], the class of each label that the model predicts; None while gradients are computed
            (`torch.is_grad_enabled()`), because only evaluations ask, and of a term without answers.
        labels: int64 [B·n], where they follow from what a model has done; default those of the batch, which has as many
            of them that count.
    """

    losses: torch.Tensor
    guesses: torch.Tensor | None
    labels: torch.Tensor | None = None


class Tally(NamedTuple):
    """Totals of a term over an evaluation: the losses, how many labels were predicted, how many there are.

    And of a term with two classes how many labels are 1, and how many of those that count were predicted to be.
    """

    loss: float
    right: float
    labels: float
    ones: float = 0.0
    guessed_ones: float = 0.0

    @property
    def mean(self) -> float:
        """The mean loss; NaN where nothing has a label."""
        return self.loss / self.labels if self.labels else math.nan

    @property
    def accuracy(self) -> float:
        return self.right / self.labels if self.labels else math.nan

    @property
    def right_ones(self) -> float:
        """How many labels of 1 were predicted: right = labels − ones − guessed_ones + 2 · right_ones."""
        return (self.right - self.labels + self.ones + self.guessed_ones) / 2

    @property
    def precision(self) -> float:
        """The share of those that were predicted to be 1 which are."""
        return self.right_ones / self.guessed_ones if self.guessed_ones else math.nan

    @property
    def recall(self) -> float:
        """The share of the labels of 1 that were predicted."""
        return self.right_ones / self.ones if self.ones else math.nan


class Criterion(Protocol):
    """The loss of a run, in the training process."""

    terms: tuple[Term, ...]

    def predict(self, network: Network, batch: Batch) -> dict[str, Predicted]:
        """Run a batch through the network, once for all terms."""
        ...

    def metrics(self, tallies: Mapping[str, Tally]) -> dict[str, float]:
        """Name what an evaluation has found beside `eval/loss`, which is the weighted loss."""
        ...

    def describe(self, values: Mapping[str, float]) -> str:
        """Say what `metrics` has named, for the console."""
        ...


def loss_sums(criterion: Criterion, network: Network, batch: Batch, source_count: int) -> torch.Tensor:
    """Sum the losses of a batch: fp32 [terms, source_count], nats; one column for a batch without `sources`."""
    predicted = criterion.predict(network, batch)
    return torch.stack([_by_source(predicted[term.name].losses, batch, source_count) for term in criterion.terms])


def _by_source(losses: torch.Tensor, batch: Batch, source_count: int) -> torch.Tensor:
    if batch.sources is None:
        return losses.sum().view(1)
    losses = losses.view(len(batch.sources), -1)
    # A product with 0 and 1 instead of a scattered sum, whose order is not fixed on CUDA.
    of_source = batch.sources[:, None] == torch.arange(source_count, device=losses.device)
    return (losses.sum(dim=1, keepdim=True) * of_source).sum(dim=0)


def loss_to_differentiate(
    terms: Sequence[Term], sums: torch.Tensor, counts: Sequence[float], averaged: int
) -> torch.Tensor:
    """Make the scalar whose gradient a micro-batch adds; `sums` are its [terms, sources].

    Args:
        counts: of the labels of each term in the global batch.
        averaged: how many micro-batches the step has on all ranks: DeepSpeed divides the gradients by it, so it is
            multiplied with here.
    """
    scales = [averaged * term.weight / max(1.0, count) for term, count in zip(terms, counts, strict=True)]
    first, *others = (each.sum() * scale for each, scale in zip(sums, scales, strict=True))
    return sum(others, start=first)


def share_of_loss(terms: Sequence[Term], sums: torch.Tensor, counts: Sequence[float]) -> torch.Tensor:
    """Compute this rank's share of the loss of a step, a scalar: over all ranks the shares add up to it."""
    parts = zip(terms, sums, counts, strict=True)
    first, *others = (term.weight * each.sum() / max(1.0, count) for term, each, count in parts)
    return sum(others, start=first)


@torch.no_grad()
def tally(criterion: Criterion, network: Network, batch: Batch) -> torch.Tensor:
    """Run and score a batch; see `tally_of`."""
    return tally_of(criterion.terms, criterion.predict(network, batch), batch)


def tally_of(terms: Sequence[Term], predicted: Mapping[str, Predicted], batch: Batch) -> torch.Tensor:
    """Score what was predicted, in an evaluation, of a batch: fp64 [terms, 5], the fields of `Tally`."""
    rows = []
    for term in terms:
        found = predicted[term.name]
        labels = batch.labels[term.name] if found.labels is None else found.labels
        counted = labels != IGNORED_LABEL
        none = torch.zeros_like(counted)
        guesses = found.guesses if term.has_answers else None
        right, guessed_ones = (none, none) if guesses is None else (guesses == labels, (guesses == 1) & counted)
        numbers = (found.losses, right, counted, labels == 1, guessed_ones)
        rows.append(torch.stack([each.sum().double() for each in numbers]))
    return torch.stack(rows)


@dataclass(frozen=True)
class ObjectiveCard:
    """What a model card says of an objective.

    Attributes:
        tags: of the model's page; the first is the pipeline that takes the model.
        settings: (the section `objective` of the run's config, positions trained on) → a line.
        results: names of what an evaluation finds → (what it is, the format of its value).
        use: Python that uses the model in PATH_OF_THIS_FOLDER.
    """

    tags: tuple[str, ...]
    settings: Callable[[Mapping[str, Any], int], str]
    results: Mapping[str, tuple[str, str]]
    use: str
