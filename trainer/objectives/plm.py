"""Permutation language modelling: some tokens are predicted, one after the other in a random order (XLNet).

Yang et al., arXiv:1906.08237. A predicted token is told from all tokens that are not predicted, and from those that
come before it in the order. The model has two streams: one sees the tokens themselves, and the other, which predicts,
only their positions. So nothing is masked, and no mask token is ever shown. A block is `content <sep> <cls>`.

Without memory XLNet's own pre-training shows a predicted token the same, but for `<sep>` and `<cls>`: those have a
place in the order there, and here they are seen by all, and see no predicted token. The memory of earlier blocks is
left out, because a batch would depend on the batches before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.config import ObjectiveConfig
from trainer.data.batch import RANKS, Batch
from trainer.data.blocks import IGNORED_LABEL, Blocks, framed_view
from trainer.data.manifest import WORD_STARTS
from trainer.data.order.permutation import GOLDEN, KeyPurpose, fold_key, mix64_in_place
from trainer.data.tokenizer import BEGIN, END, Vocabulary, need_tokens
from trainer.objectives.framing import frame_at_end
from trainer.objectives.masking import Masking, predictions_per_block
from trainer.objectives.mlm import share_of_tokens
from trainer.objectives.objective import ObjectiveCard
from trainer.objectives.units import LENGTHS
from trainer.schedule.mask_ratio import Stages

TERM = "plm"
ACCURACY = ("eval/masked_accuracy", "accuracy")
# Of the block's SplitMix64 sequence (`trainer.objectives.masking`) position p takes the (2^17 + p)-th number for its
# place in the order: masks take those below, lengths of units those from 3·2^16 − 1 on.
_ORDER_DRAWS = np.uint64(2 << 16)
_LAST = np.uint64(0xFFFF_FFFF_FFFF_FFFF)


def _described(settings: Mapping[str, Any], tokens: int) -> str:
    return f"plm, {share_of_tokens(settings, tokens)} in a random order, new at each visit"


CARD = ObjectiveCard(
    tags=("text-generation", "permutation-lm"),
    settings=_described,
    results={
        "eval/perplexity": ("validation perplexity of predicted tokens", ".2f"),
        "eval/masked_accuracy": ("predicted tokens told right", ".1%"),
    },
    use="""\
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH_OF_THIS_FOLDER")
model = AutoModelForCausalLM.from_pretrained("PATH_OF_THIS_FOLDER").eval()
tokens = tokenizer("The capital of France is Paris", add_special_tokens=False).input_ids
ids = torch.tensor([[*tokens, tokenizer.sep_token_id or tokenizer.eos_token_id]])
place, length = len(tokens) - 1, ids.shape[1]  # which token is to be told from all others
hidden, target = torch.zeros(1, length, length), torch.zeros(1, 1, length)
hidden[:, :, place] = target[:, :, place] = 1.0
with torch.no_grad():
    logits = model(ids, perm_mask=hidden, target_mapping=target).logits[0, 0]
print([tokenizer.decode(token) for token in logits.topk(5).indices])""",
)


class PermutedSamples:
    """Chooses what is predicted of a block, and in which order; see `trainer.data.batch.Samples`.

    Positions are chosen as masks are (`trainer.objectives.masking`), but for whether they are replaced: none is. The
    order is a pure function of (seed, t, position), in which each one is equally likely.

    Args:
        ratios: share of the content tokens that is predicted, by sample; default the first of the settings throughout.

    Raises:
        UserError: when the tokenizer lacks a begin or end token.
    """

    def __init__(
        self, settings: ObjectiveConfig, vocabulary: Vocabulary, seq_len: int, ratios: Stages | None = None
    ) -> None:
        need_tokens(vocabulary, (BEGIN, END))
        self.vocabulary, self.seq_len = vocabulary, seq_len
        self.view = framed_view(seq_len)
        self.marks: tuple[str, ...] = () if settings.scheme == "token" else (WORD_STARTS,)
        (_, first), *later = ratios or settings.mask_ratios[:1]
        counts = {predictions_per_block(ratio, self.view.payload) for ratio in (first, *(ratio for _, ratio in later))}
        self.head_rows, self.shape_count = max(counts), len(counts)
        self.masking = Masking(
            mask_ratio=first,
            later=tuple(later),
            replace_mask=0.0,
            replace_random=0.0,
            mask_id=vocabulary.end_id,  # is never shown
            vocabulary_size=vocabulary.size,
            special_ids=(*vocabulary.special_ids, *vocabulary.unused_ids),
            lengths=tuple(settings.lengths or LENGTHS[settings.scheme]),
        )

    def make_batch(self, blocks: Blocks, samples: np.ndarray, seed: int) -> Batch:
        """Choose positions and their order; see `Samples.make_batch`."""
        framed = frame_at_end(blocks, self.vocabulary)
        words = framed.starts.get(WORD_STARTS)
        tokens, index, labels = self.masking.apply(framed.tokens, samples, seed, words, framed.contents)
        labels = labels.reshape(len(tokens), -1)
        missing = labels == IGNORED_LABEL
        places = index.reshape(labels.shape) - self._row_starts(len(tokens))
        places[missing] = self.seq_len - 1
        keys = fold_key(KeyPurpose.MASKING, seed, samples)
        draws = keys[:, None] + (places.astype(np.uint64) + _ORDER_DRAWS) * GOLDEN
        mix64_in_place(draws, np.empty_like(draws))
        draws[missing] = _LAST
        return self._batch(tokens, places, labels, draws.argsort(axis=1, kind="stable"))

    def plain(self, blocks: Blocks) -> Batch:
        """Predict evenly spread positions, the first and the last among them; see `Samples.plain`.

        Every second one comes before all others, so that a model whose streams, or whose order, are not right gives
        other logits.
        """
        tokens = frame_at_end(blocks, self.vocabulary).tokens
        row = np.linspace(0, self.seq_len - 1, self.head_rows).astype(np.int64)
        places = np.broadcast_to(row, (len(tokens), len(row)))
        order = np.concatenate([np.arange(1, len(row), 2), np.arange(0, len(row), 2)])
        return self._batch(tokens, places, tokens[:, row], np.broadcast_to(order, places.shape))

    def document_starts(self, blocks: Blocks) -> np.ndarray:
        """Find where documents begin; see `Samples.document_starts`. A block is one."""
        starts = np.zeros((len(blocks.tokens), self.seq_len), np.bool_)
        starts[:, 0] = True
        return starts

    def _row_starts(self, rows: int) -> NDArray[np.int64]:
        """Number the first position of each block in the flattened [B·S]: [B, 1]."""
        return np.arange(rows)[:, None] * self.seq_len

    def _batch(
        self, tokens: NDArray[np.int64], places: NDArray[np.int64], labels: NDArray[np.int64], order: NDArray[np.intp]
    ) -> Batch:
        """Make a batch of B blocks.

        Args:
            tokens: [B, S].
            places: [B, k], the positions of a block that are predicted, and that of `<cls>` where none is.
            labels: [B, k], IGNORED_LABEL where none is.
            order: [B, k], a block's columns of `places` as they are predicted; those where none is come last.
        """
        ranks = np.full(tokens.shape, -1, np.int64)
        rows, columns = np.nonzero(labels != IGNORED_LABEL)
        ranks[rows, places[rows, columns]] = order.argsort(axis=1)[rows, columns]
        return Batch(
            inputs={"input_ids": torch.from_numpy(tokens), RANKS: torch.from_numpy(ranks)},
            labels={TERM: torch.from_numpy(labels.reshape(-1))},
            prediction_index=torch.from_numpy((places + self._row_starts(len(tokens))).reshape(-1)),
        )
