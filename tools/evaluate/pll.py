"""Pseudo-log-likelihood: how likely a masked model finds each token of a text, given all the others.

PLL (Salazar et al., arXiv:1910.14659) masks one token at a time. Of a word of several tokens those beside it give it
away, so that rare words seem likely; PLL-word-l2r (Kauf and Ivanova, arXiv:2305.10588), which is computed here, masks
those of its word that follow it as well.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

from tools.evaluate.pieces import PieceTokenizer, find_units
from trainer.data.tokenizer import Vocabulary
from trainer.evaluation.evaluated import Evaluated
from trainer.objectives.cross_entropy import cross_entropies
from trainer.runtime import distributed
from trainer.runtime.distributed import World


@dataclass(frozen=True)
class PseudoLikelihood:
    """Totals over all passages.

    Attributes:
        nats: Σ −ln P(token | what is shown).
        tokens, words: that the passages have; words are runs of letters and digits, and single Han characters.
    """

    nats: float
    tokens: int
    words: int

    def facts(self) -> dict[str, float]:
        """Write them with what follows from them."""
        return {
            **asdict(self),
            "nats_per_token": self.nats / self.tokens,
            "nats_per_word": self.nats / self.words,
            "perplexity": math.exp(min(self.nats / self.tokens, 700.0)),
        }


@dataclass(frozen=True)
class MaskedRow:
    """A passage as it is shown to predict one token.

    Attributes:
        ids: with the masks in it, between begin and end token.
        place: of the token, in `ids`.
        label: the token.
    """

    ids: list[int]
    place: int
    label: int


def masked_rows(passage: str, tokenizer: PieceTokenizer, vocabulary: Vocabulary) -> Iterator[MaskedRow]:
    """Mask each token of a passage with those of its word that follow it (PLL-word-l2r)."""
    assert vocabulary.mask_id is not None
    pieces = tokenizer(passage)
    groups = pieces.groups(find_units(passage))
    framed = [vocabulary.begin_id, *pieces.ids, vocabulary.end_id]
    for place, (label, group) in enumerate(zip(pieces.ids, groups, strict=True)):
        end = place
        while end < len(groups) and groups[end] == group:
            end += 1
        ids = [*framed[: place + 1], *[vocabulary.mask_id] * (end - place), *framed[end + 1 :]]
        yield MaskedRow(ids, place + 1, label)


def make_batches(
    passages: Sequence[str], tokenizer: PieceTokenizer, vocabulary: Vocabulary, batch_tokens: int
) -> list[list[MaskedRow]]:
    """Put rows of equal length together, so that none has padding.

    Args:
        batch_tokens: of a batch, at most, but for a row that is longer.
    """
    by_length: defaultdict[int, list[MaskedRow]] = defaultdict(list)
    for passage in passages:
        for row in masked_rows(passage, tokenizer, vocabulary):
            by_length[len(row.ids)].append(row)
    batches = []
    for length, rows in sorted(by_length.items()):
        size = max(1, batch_tokens // length)
        batches += [rows[first : first + size] for first in range(0, len(rows), size)]
    return batches


def pseudo_likelihood(
    model: Evaluated,
    batches: Sequence[Sequence[MaskedRow]],
    passages: Sequence[str],
    world: World,
    tick: Callable[[], None],
) -> PseudoLikelihood:
    """Compute it over passages of which each fits into the model; every rank calls it, and takes its share.

    Args:
        batches: of the passages. They do not depend on the number of ranks, so neither does the result.
        tick: called after each batch.
    """
    nats = 0.0
    with model.evaluating():
        for rows in batches[world.rank :: world.size]:
            width = len(rows[0].ids)
            ids = torch.tensor([row.ids for row in rows], device=model.device)
            index = torch.tensor([number * width + row.place for number, row in enumerate(rows)], device=model.device)
            labels = torch.tensor([row.label for row in rows], device=model.device)
            logits = model.network({"input_ids": ids}, index).logits
            nats += float(cross_entropies(logits, labels).double().sum())
            tick()
    words = sum(unit.is_word for passage in passages for unit in find_units(passage))
    tokens = sum(len(rows) for rows in batches)
    return PseudoLikelihood(distributed.all_reduce_sum(world, [nats])[0], tokens, words)
