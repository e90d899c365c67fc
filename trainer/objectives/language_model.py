"""The loss of a model of language: the cross-entropy of tokens that it has to tell."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from trainer.data.batch import Batch, Score
from trainer.objectives.cross_entropy import CrossEntropies, cross_entropies
from trainer.objectives.objective import Network, Predicted, Tally, Term


class LanguageModelLoss:
    """The term over the logits of the vocabulary; see `trainer.objectives.objective.Criterion`.

    Args:
        term: name of the loss term, and of its labels in a batch.
        kernel: what computes the losses in training; evaluations keep to `cross_entropies`, so that they do not depend
            on it.
        accuracy: name and description of the share that is predicted right.
        ahead: see `Term`.
    """

    def __init__(
        self,
        term: str,
        kernel: CrossEntropies = cross_entropies,
        accuracy: tuple[str, str] = ("eval/masked_accuracy", "masked accuracy"),
        ahead: int = 0,
    ) -> None:
        self.terms: tuple[Term, ...] = (Term(term, 1.0, ahead=ahead),)
        self._kernel, self._accuracy = kernel, accuracy

    def predict(self, network: Network, batch: Batch) -> dict[str, Predicted]:
        """Compute the cross-entropies of the batch; see `Criterion.predict`."""
        return self.of_tokens(self.run(network, batch))

    def run(self, network: Network, batch: Batch) -> Any:
        """Run a batch through the network, scores in the place of logits; see `of_tokens`."""
        score = Score(self.score, (batch.labels[self.terms[0].name],))
        return network(batch.inputs, batch.prediction_index, batch.documents, score)

    def of_tokens(self, output: Any) -> dict[str, Predicted]:
        """Read the losses of tokens from what `run` has returned."""
        scores = output.logits
        return {self.terms[0].name: Predicted(scores[:, 0], None if torch.is_grad_enabled() else scores[:, 1].long())}

    def metrics(self, tallies: Mapping[str, Tally]) -> dict[str, float]:
        """Name perplexity and accuracy; see `Criterion.metrics`."""
        tally = tallies[self.terms[0].name]
        return {"eval/perplexity": math.exp(min(tally.mean, 700.0)), self._accuracy[0]: tally.accuracy}

    def describe(self, values: Mapping[str, float]) -> str:
        """Say perplexity and accuracy; see `Criterion.describe`."""
        name, what = self._accuracy
        return f"perplexity {values['eval/perplexity']:.2f}  {what} {values[name]:.2%}"

    def score(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Compute the losses [n, 1] or, in evaluations, losses and guesses [n, 2]: ids are exact in fp32 up to 2^24."""
        if torch.is_grad_enabled():
            return self._kernel(logits, labels).unsqueeze(1)
        return torch.stack([cross_entropies(logits, labels), logits.argmax(dim=-1).float()], dim=1)
