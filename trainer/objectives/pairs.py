"""Pairs of sentences beside masked tokens: next-sentence prediction as in BERT, sentence order as in ALBERT.

A row is `[CLS] A [SEP] B [SEP]`, full to the last token, and masked as any other. The model sees the text of
`trainer.objectives.segments` and tells from its pooled output, which is of `[CLS]`, whether B belongs where it stands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from trainer.config import ObjectiveConfig, PairConfig
from trainer.data.batch import Batch
from trainer.data.blocks import DOCUMENT_STARTS, Blocks, View
from trainer.data.manifest import SENTENCE_STARTS, WORD_STARTS
from trainer.data.order.permutation import KeyPurpose, fold_key
from trainer.data.tokenizer import Vocabulary
from trainer.objectives.cross_entropy import CrossEntropies, cross_entropies
from trainer.objectives.language_model import LanguageModelLoss
from trainer.objectives.mlm import TERM, MaskedSamples
from trainer.objectives.objective import Network, ObjectiveCard, Predicted, Term
from trainer.objectives.segments import Segments, borders_in, next_segments, ordered_segments, whole_segments
from trainer.schedule.mask_ratio import Stages

_SPECIAL_TOKENS = 3  # of a row: one before the first segment, and one after each
_TOLD = {
    "nsp": "whether B follows A or is from elsewhere (next-sentence prediction)",
    "sop": "whether A and B stand in their order (sentence-order prediction)",
}
_ANSWERS = {
    "nsp": '("B follows A", "B is from elsewhere")',
    "sop": '("in order", "not in order")',
}
_USE = """\
import torch
from transformers import AutoModelForPreTraining, AutoTokenizer

model = AutoModelForPreTraining.from_pretrained("PATH_OF_THIS_FOLDER").eval()
tokenizer = AutoTokenizer.from_pretrained("PATH_OF_THIS_FOLDER")
first, second = (
    tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("A first sentence.", "And a second one.")
)
ids = [tokenizer.cls_token_id, *first, tokenizer.sep_token_id, *second, tokenizer.sep_token_id]
types = [0] * (len(first) + 2) + [1] * (len(second) + 1)
output = model(input_ids=torch.tensor([ids]), token_type_ids=torch.tensor([types]))
of_the_pair = output[1][0]  # after the logits of the tokens
print({answers}[int(of_the_pair.argmax())])"""


def view_of(pair: PairConfig, seq_len: int) -> View:
    """Make the view of S − 3 tokens, with another block beside each for `nsp`."""
    return View(seq_len - _SPECIAL_TOKENS, partner=pair.task == "nsp")


def card_of(card: ObjectiveCard, task: str) -> ObjectiveCard:
    """Add pairs to what a model card says of masked tokens."""
    return replace(
        card,
        tags=(*card.tags, {"nsp": "next-sentence-prediction", "sop": "sentence-order-prediction"}[task]),
        settings=lambda settings, tokens: (
            f"{card.settings(settings, tokens)}; and of pairs of segments {_TOLD[task]}, "
            f"with weight {settings['pair']['weight']:g}"
        ),
        results={**card.results, f"eval/{task}/accuracy": ("pairs told right", ".1%")},
        use=f"{card.use}\n```\n\nThe pair's head:\n\n```python\n{_USE.replace('{answers}', _ANSWERS[task])}",
    )


class PairedSamples(MaskedSamples):
    """Makes pairs of blocks, and masks them; see `trainer.data.batch.Samples`.

    Args:
        pair: which task.
        ratios: as of `MaskedSamples`.

    Raises:
        UserError: as `MaskedSamples`.
    """

    def __init__(
        self,
        settings: ObjectiveConfig,
        pair: PairConfig,
        vocabulary: Vocabulary,
        seq_len: int,
        ratios: Stages | None = None,
    ) -> None:
        super().__init__(settings, vocabulary, seq_len, ratios=ratios, view=view_of(pair, seq_len))
        self.task = pair.task
        self.marks = (DOCUMENT_STARTS, SENTENCE_STARTS, *self.marks)

    def make_batch(self, blocks: Blocks, samples: np.ndarray, seed: int) -> Batch:
        """Cut, compose and mask blocks; see `Samples.make_batch`."""
        segments = self._cut(blocks, fold_key(KeyPurpose.PAIR, seed, samples))
        tokens, words = self._compose(blocks, segments)
        payload = self.view.payload
        masked = self.masking.apply(tokens, samples, seed, words, np.full(len(tokens), payload), payload)
        return self._batch(segments, *masked)

    def plain(self, blocks: Blocks) -> Batch:
        """Show blocks as pairs that are cut in their middle; see `Samples.plain`."""
        segments = whole_segments(*blocks.tokens.shape)
        tokens, _ = self._compose(blocks, segments)
        return self._batch(segments, tokens, *self.evenly_spread(tokens))

    def document_starts(self, blocks: Blocks) -> np.ndarray:
        """Find none but the row's first token: a pair is one sequence; see `Samples.document_starts`."""
        return np.arange(self.seq_len) == np.zeros((len(blocks.tokens), 1))

    def _cut(self, blocks: Blocks, keys: np.ndarray) -> Segments:
        payload = self.view.payload
        borders = borders_in(blocks.starts[SENTENCE_STARTS], blocks.starts[DOCUMENT_STARTS], payload)
        if self.task == "sop":
            return ordered_segments(borders, keys)
        partner = blocks.partner
        assert partner is not None and partner.lengths is not None
        others = borders_in(partner.starts[SENTENCE_STARTS], partner.starts[DOCUMENT_STARTS], payload)
        return next_segments(borders, others, partner.lengths, keys)

    def _compose(self, blocks: Blocks, segments: Segments) -> tuple[np.ndarray, np.ndarray | None]:
        """Lay out rows: int64 [B, S] of tokens and, where words are masked, bool [B, S] of where they start."""
        order = np.arange(segments.tokens.shape[1])
        place = 1 + order + (order >= segments.first[:, None])
        rows = np.full((len(place), self.seq_len), self.vocabulary.end_id, np.int64)
        rows[:, 0] = self.vocabulary.begin_id
        partner = blocks.partner
        read = [blocks.tokens] if partner is None else [blocks.tokens, partner.tokens]
        np.put_along_axis(rows, place, _taken(read, segments.tokens), axis=1)
        if WORD_STARTS not in blocks.starts:
            return rows, None
        marks = (
            [blocks.starts[WORD_STARTS]]
            if partner is None
            else [each.starts[WORD_STARTS] for each in (blocks, partner)]
        )
        words = _taken(marks, segments.tokens)
        words[:, 1:] |= np.diff(segments.tokens, axis=1) != 1  # what stands beside other text than in its block
        starts = np.zeros(rows.shape, np.bool_)
        np.put_along_axis(starts, place, words, axis=1)
        return rows, starts

    def _batch(self, segments: Segments, shown: np.ndarray, index: np.ndarray, labels: np.ndarray) -> Batch:
        types = np.arange(self.seq_len) >= segments.first[:, None] + 2  # a separator is of the segment before it
        return Batch(
            inputs={"input_ids": torch.from_numpy(shown), "token_type_ids": torch.from_numpy(types.astype(np.int64))},
            labels={TERM: torch.from_numpy(labels), self.task: torch.from_numpy(segments.labels)},
            prediction_index=torch.from_numpy(index),
        )


class PairLoss(LanguageModelLoss):
    """The loss of masked tokens, and that of pairs; see `trainer.objectives.objective.Criterion`."""

    def __init__(self, pair: PairConfig, kernel: CrossEntropies = cross_entropies) -> None:
        super().__init__(TERM, kernel)
        self.task = pair.task
        self.terms = (*self.terms, Term(pair.task, pair.weight, one_a_block=True))

    def predict(self, network: Network, batch: Batch) -> dict[str, Predicted]:
        """Compute the cross-entropies of tokens and pairs in one pass; see `Criterion.predict`."""
        output = self.run(network, batch)
        losses = cross_entropies(output.pair_logits, batch.labels[self.task])
        guesses = None if torch.is_grad_enabled() else output.pair_logits.argmax(dim=-1)
        return {**self.of_tokens(output), self.task: Predicted(losses, guesses)}

    def describe(self, values: Mapping[str, float]) -> str:
        """Say how many pairs are told right, and how many have no label; see `Criterion.describe`."""
        accuracy, ignored = (values[f"eval/{self.task}/{name}"] for name in ("accuracy", "ignored"))
        without = f" ({ignored:.1%} of the pairs ignored)" if ignored else ""
        told = f"accuracy {accuracy:.2%}{without}" if ignored < 1 else "has no pair here"
        return f"{super().describe(values)}  {self.task} {told}"


def _taken(read: Sequence[np.ndarray], index: np.ndarray) -> np.ndarray:
    """Take of each row, of what was read of the block and then of its partner, what is at `index` [B, P]."""
    return np.take_along_axis(read[0] if len(read) == 1 else np.concatenate(read, axis=1), index, axis=1)
