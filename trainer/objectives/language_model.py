"""The loss of a model of language: the cross-entropy of tokens that it has to tell."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from trainer.data.batch import Batch
from trainer.objectives.cross_entropy import CrossEntropies, cross_entropies
from trainer.objectives.objective import Network, Predicted, Tally, Term


class LanguageModelLoss:
    """One term over the logits of the vocabulary; see `trainer.objectives.objective.Criterion`.

    Args:
        term: name of the loss term, and of its labels in a batch.
        kernel: what computes the losses in training; evaluations keep to `cross_entropies`, so that they do not depend
            on it.
    """

    def __init__(self, term: str, kernel: CrossEntropies = cross_entropies) -> None:
        self.terms = (Term(term, 1.0),)
        self._kernel = kernel

    def predict(self, network: Network, batch: Batch) -> dict[str, Predicted]:
        """Compute the cross-entropies of the batch; see `Criterion.predict`."""
        (term,) = self.terms
        logits = network(batch.inputs, batch.prediction_index, batch.documents).logits
        kernel = self._kernel if torch.is_grad_enabled() else cross_entropies
        guesses = None if torch.is_grad_enabled() else logits.argmax(dim=-1)
        return {term.name: Predicted(kernel(logits, batch.labels[term.name]), guesses)}

    def metrics(self, tallies: Mapping[str, Tally]) -> dict[str, float]:
        """Name perplexity and accuracy; see `Criterion.metrics`."""
        (tally,) = tallies.values()
        return {"eval/perplexity": math.exp(min(tally.mean, 700.0)), "eval/masked_accuracy": tally.accuracy}

    def describe(self, values: Mapping[str, float]) -> str:
        """Say perplexity and accuracy; see `Criterion.describe`."""
        return f"perplexity {values['eval/perplexity']:.2f}  masked accuracy {values['eval/masked_accuracy']:.2%}"
