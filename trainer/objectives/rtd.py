"""Replaced-token detection: a generator fills masked tokens in, and the model tells of each token whether it did.

ELECTRA (Clark et al., arXiv:2003.10555): L = mlm + λ · rtd, the mean cross-entropy of the generator over predicted
tokens, and the mean binary cross-entropy of the model over all tokens, those at the ends among them. A token that the
generator has drawn counts as replaced only if it is another one than the original.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from trainer.config import GeneratorConfig
from trainer.data.batch import DRAWS, Batch
from trainer.data.blocks import IGNORED_LABEL, Blocks
from trainer.data.order.permutation import GOLDEN, KeyPurpose, fold_key, mix64_in_place
from trainer.objectives.cross_entropy import CrossEntropies, cross_entropies
from trainer.objectives.language_model import LanguageModelLoss
from trainer.objectives.mlm import CARD as MASKED_CARD
from trainer.objectives.mlm import TERM as MASKED
from trainer.objectives.mlm import MaskedSamples, share_of_tokens, shown_instead
from trainer.objectives.objective import Network, ObjectiveCard, Predicted, Tally, Term

TERM = "rtd"
# Of the block's SplitMix64 sequence (`trainer.objectives.masking`) position p takes the (2^17 + p)-th number for its
# draw: masks take those below, lengths of units those from 3·2^16 − 1 on.
_TOKEN_DRAWS = np.uint64(2 << 16)
_DROPPED_BITS = np.uint64(40)  # 24 are left, as many as fp32 is exact to below 1
_UNIT = np.float32(2.0**-24)


def _described(settings: Mapping[str, Any], tokens: int) -> str:
    generator = settings["generator"]
    return (
        f"rtd: which tokens a generator has replaced, with weight {generator['weight']:g}; the generator: "
        f"{share_of_tokens(settings, tokens)} ({shown_instead(settings)}), new masks at each visit; "
        f"shared: {generator['share']}"
    )


CARD = ObjectiveCard(
    tags=("feature-extraction", "replaced-token-detection"),
    settings=_described,
    results={
        "eval/rtd/accuracy": ("tokens told right, replaced or not", ".2%"),
        "eval/rtd/precision": ("of those told to be replaced, which are", ".1%"),
        "eval/rtd/recall": ("replaced tokens found", ".1%"),
        "eval/perplexity": ("validation perplexity of the generator's masked tokens", ".2f"),
    },
    use="""\
import torch
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH_OF_THIS_FOLDER")
encoder = AutoModel.from_pretrained("PATH_OF_THIS_FOLDER").eval()  # for fine-tuning, AutoModelForSequenceClassification
with torch.no_grad():
    states = encoder(**tokenizer("The capital of France is Paris.", return_tensors="pt")).last_hidden_state
print(states.shape)""",
)
GENERATOR_CARD = ObjectiveCard(
    tags=MASKED_CARD.tags,
    settings=lambda settings, tokens: f"generator of {_described(settings, tokens)}",
    results=MASKED_CARD.results,
    use=MASKED_CARD.use,
)


class ReplacedSamples(MaskedSamples):
    """Masks blocks, and draws a number for each predicted token; see `trainer.data.batch.Samples`.

    Arguments and errors are those of `MaskedSamples`.
    """

    def make_batch(self, blocks: Blocks, samples: np.ndarray, seed: int) -> Batch:
        """Mask blocks and draw; see `Samples.make_batch`."""
        framed = self.frame(blocks)
        batch = self.mask(framed, samples, seed)
        assert batch.prediction_index is not None
        labels = batch.labels[MASKED].view(batch.rows, -1).numpy()
        places = batch.prediction_index.view(labels.shape).numpy() % self.seq_len
        numbers = fold_key(KeyPurpose.MASKING, seed, samples)[:, None] + (
            (places.astype(np.uint64) + _TOKEN_DRAWS) * GOLDEN
        )
        mix64_in_place(numbers, np.empty_like(numbers))
        draws = (numbers >> _DROPPED_BITS).astype(np.float32) * _UNIT
        draws[labels == IGNORED_LABEL] = -1.0
        return self._with_draws(batch, draws, framed.lengths)

    def plain(self, blocks: Blocks) -> Batch:
        """Show blocks as they are, with evenly spread draws; see `Samples.plain`."""
        batch = super().plain(blocks)
        row = (np.arange(self.head_rows, dtype=np.float32) + 0.5) / self.head_rows
        return self._with_draws(batch, np.tile(row, (batch.rows, 1)), np.full(batch.rows, self.seq_len))

    def _with_draws(self, batch: Batch, draws: np.ndarray, lengths: np.ndarray) -> Batch:
        """Add numbers [B, k], and places for the labels, which the model gives; padding after `lengths` has none."""
        batch.inputs[DRAWS] = torch.from_numpy(draws)
        padding = np.arange(self.seq_len) >= lengths[:, None]
        batch.labels[TERM] = torch.from_numpy(np.where(padding, IGNORED_LABEL, 0).reshape(-1))
        return batch


class ReplacedLoss(LanguageModelLoss):
    """The loss of a generator, and of what finds out its tokens; see `trainer.objectives.objective.Criterion`."""

    def __init__(self, generator: GeneratorConfig, kernel: CrossEntropies = cross_entropies) -> None:
        super().__init__(MASKED, kernel)
        self.terms = (*self.terms, Term(TERM, generator.weight))

    def predict(self, network: Network, batch: Batch) -> dict[str, Predicted]:
        """Compute the cross-entropies of masked tokens and of all tokens in one pass; see `Criterion.predict`."""
        output = self.run(network, batch)
        labels = labels_of(batch, output.sampled)
        logits, counted = output.detected.flatten().float(), labels != IGNORED_LABEL
        targets = labels.clamp(min=0).float()
        losses = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").where(counted, 0.0)
        guesses = None if torch.is_grad_enabled() else (logits > 0).long()
        return {**self.of_tokens(output), TERM: Predicted(losses, guesses, labels)}

    def metrics(self, tallies: Mapping[str, Tally]) -> dict[str, float]:
        """Name what the generator has predicted, and which replaced tokens were found; see `Criterion.metrics`."""
        found = tallies[TERM]
        of_replaced = {"eval/rtd/precision": found.precision, "eval/rtd/recall": found.recall}
        return {**super().metrics(tallies), **of_replaced}

    def describe(self, values: Mapping[str, float]) -> str:
        """Say how the generator does, and what is found of its tokens; see `Criterion.describe`."""
        shares = {name: values[f"eval/rtd/{name}"] for name in ("accuracy", "precision", "recall")}
        told = "  ".join(f"{name} {'–' if math.isnan(share) else f'{share:.2%}'}" for name, share in shares.items())
        return f"generator {super().describe(values)}  replaced tokens: {told}"


def labels_of(batch: Batch, sampled: torch.Tensor) -> torch.Tensor:
    """Tell which tokens were replaced: int64 [B·S], 1 where another token was drawn; IGNORED_LABEL as in the batch.

    Args:
        sampled: int64 [B·k], what was drawn at the predicted positions.
    """
    originals, index, labels = batch.labels[MASKED], batch.prediction_index, batch.labels[TERM]
    assert index is not None
    is_other = (sampled != originals) & (originals != IGNORED_LABEL)
    # A position that stands for no prediction may come several times, and was replaced at none of them.
    replaced = torch.zeros_like(labels).scatter(0, index, is_other.long())
    return replaced.where(labels != IGNORED_LABEL, labels)
