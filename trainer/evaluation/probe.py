"""The probe: how well classes of texts can be read from an encoder as it is.

The last hidden states of each text are averaged over its tokens, and a logistic regression on these means is
cross-validated (Alain and Bengio, arXiv:1610.01644; Conneau and Kiela's SentEval, arXiv:1803.05449). Nothing of the
encoder is trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from trainer.data.labels import LabelledTexts
from trainer.evaluation.evaluated import Evaluated
from trainer.runtime import distributed
from trainer.runtime.distributed import World

C = 1.0
"""Inverse strength of the L2 penalty, on standardized features (docs/decisions.md)."""
_SEED = 0  # of the folds, whatever the run's seed: probes are comparable between runs
_SHORTEST = 8  # tokens that a batch is padded to at least
_ITERATIONS = 1000
_NAME = "eval/probe/"

StatesOf = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]
"""`input_ids` and `attention_mask` [B, S], padded at their ends → the last hidden states [B, S, H]."""


@dataclass(frozen=True)
class ProbeResult:
    """What cross-validation has found: mean and standard deviation over the folds.

    NaN where the features were not finite.

    Attributes:
        accuracy: share of the texts whose class is told right.
        macro_f1: mean of the F1 of the classes.
        majority: share of the most frequent class: the accuracy of who always tells that.
    """

    accuracy: float
    accuracy_std: float
    macro_f1: float
    macro_f1_std: float
    majority: float

    def metrics(self) -> dict[str, float]:
        """Name the values as metrics."""
        return {f"{_NAME}{name}": value for name, value in vars(self).items()}


class Probe:
    """A run's labelled texts, probed at its evaluations; each rank takes its share of the forward passes.

    Args:
        tokens: int64 [s] of each text, s ≤ `longest`.
        padding: the id that fills up.
        longest: tokens that the model can be given.
        rows: texts of that length that a rank runs on at once; of shorter ones as many more.
    """

    def __init__(
        self, labelled: LabelledTexts, tokens: Sequence[np.ndarray], padding: int, longest: int, rows: int
    ) -> None:
        self._labelled, self._tokens, self._padding = labelled, tokens, padding
        self._batches = batches_of([len(each) for each in tokens], longest, rows)

    def run(
        self, engine: Evaluated, world: World, stop_early: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """Probe the model of an engine; every rank calls it. None when a rank was asked to stop meanwhile.

        Returns:
            its metrics, the same on all ranks.
        """
        passes = math.ceil(len(self._batches) / world.size)  # the same on all ranks: ZeRO-3 gathers in step
        found: list[np.ndarray] = []
        with engine.evaluating():
            for number in range(passes):
                (stop,) = distributed.all_reduce_sum(world, [stop_early()])
                if stop:
                    return None
                # Beyond the last one is the first again, in vain.
                batch = self._batches[(number * world.size + world.rank) % len(self._batches)]
                found.append(features_of(engine.network.states, batch, self._tokens, self._padding, engine.device))
        of_ranks = distributed.gather_on_main(world, found)
        result = None
        if of_ranks is not None:
            in_order = [of_ranks[place % world.size][place // world.size] for place in range(len(self._batches))]
            features = _by_text(self._batches, in_order)
            result = cross_validate(features, self._labelled.labels, self._labelled.folds)
        return distributed.broadcast_from_main(world, result).metrics()


class TextBatch(NamedTuple):
    """What is run at once.

    Attributes:
        texts: int64 [B], their numbers.
        length: tokens that they are padded to.
    """

    texts: np.ndarray
    length: int


def batches_of(lengths: Sequence[int], longest: int, rows: int) -> list[TextBatch]:
    """Put texts of about one length together, each text once: a function of the arguments, whatever the ranks.

    Each text is padded to the next power of two, or to `longest`: so passes have few shapes, and what is computed for
    a text does not depend on those beside it.

    Args:
        lengths: of the texts, in tokens.
        rows: of texts of `longest` tokens in a batch; as many tokens are in one of shorter texts.
    """
    padded = np.array([min(longest, max(_SHORTEST, 1 << (length - 1).bit_length())) for length in lengths])
    batches = []
    for length in np.unique(padded).tolist():
        texts, size = np.flatnonzero(padded == length), rows * longest // length
        batches += [TextBatch(part, length) for part in np.split(texts, range(size, len(texts), size))]
    return batches


@torch.no_grad()
def features_of(
    states_of: StatesOf, batch: TextBatch, tokens: Sequence[np.ndarray], padding: int, device: torch.device
) -> np.ndarray:
    """Average the last hidden states of each text of a batch over its tokens, special ones included: fp32 [B, H].

    Args:
        tokens: int64 [s] of each text, of all batches.
        padding: the id that fills up; some classes (ConvBERT, MobileBERT) look at neighbours whatever the mask says.
    """
    input_ids = np.full((len(batch.texts), batch.length), padding)
    mask = np.zeros_like(input_ids)
    for row, text in enumerate(batch.texts.tolist()):
        size = len(tokens[text])
        input_ids[row, :size], mask[row, :size] = tokens[text], 1
    inputs = {"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(mask)}
    inputs = {name: value.to(device) for name, value in inputs.items()}
    return mean_over_tokens(states_of(inputs), inputs["attention_mask"]).cpu().numpy()


def _by_text(batches: Sequence[TextBatch], features: Sequence[np.ndarray]) -> np.ndarray:
    """Bring the features [B, H] of all batches into the order of the texts: [n, H]."""
    texts = np.concatenate([batch.texts for batch in batches])
    return np.concatenate(features)[np.argsort(texts)]


def mean_over_tokens(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Average [B, S, H] over the positions where `mask`, int64 [B, S], is 1: fp32 [B, H]."""
    counted = mask.unsqueeze(-1).bool()
    return torch.where(counted, states.float(), 0.0).sum(dim=1) / mask.sum(dim=1, keepdim=True)


def cross_validate(features: np.ndarray, labels: np.ndarray, folds: int) -> ProbeResult:
    """Fit to all folds but one, tell the classes of that one, and so on: a function of its arguments alone.

    Args:
        features: fp32 [n, H].
        labels: int64 [n], 0 ≤ label < number of classes.
        folds: each with the classes in their shares (stratified).
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score
    from sklearn.model_selection import StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    majority = float(np.bincount(labels).max() / len(labels))
    if not np.isfinite(features).all():
        return ProbeResult(math.nan, math.nan, math.nan, math.nan, majority)
    accuracies, f1s = [], []
    for fitted, left_out in StratifiedKFold(folds, shuffle=True, random_state=_SEED).split(features, labels):
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=_ITERATIONS))
        classifier.fit(features[fitted].astype(np.float64), labels[fitted])
        told = classifier.predict(features[left_out].astype(np.float64))
        accuracies.append(np.mean(told == labels[left_out]))
        f1s.append(f1_score(labels[left_out], told, average="macro"))
    spread = float(np.std(accuracies)), float(np.std(f1s))
    return ProbeResult(float(np.mean(accuracies)), spread[0], float(np.mean(f1s)), spread[1], majority)
