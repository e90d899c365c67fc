"""What the model tells of the first validation samples, in text: a line of RUN/examples.jsonl an evaluation.

An evaluation guesses these tokens anyway. Which samples and tokens are shown depends on the validation data and the
objective alone, so an example can be followed over a whole run, and from run to run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from trainer.data.batch import Batch
from trainer.data.blocks import IGNORED_LABEL
from trainer.data.decoding import decode_runs
from trainer.objectives.objective import Predicted, Term

SAMPLES = 4
"""The first validation samples, as many as are shown."""
TOKENS = 8
"""Predicted tokens of a sample, at most."""
_WINDOW = 64  # tokens of a sample, from its start on, among which they are: a passage that a person reads
_AFTER = 8  # tokens that are shown behind the last of them, where there are


def shown_term(terms: Sequence[Term]) -> Term | None:
    """Find the term whose labels are tokens; None in a loss without one."""
    return next((term for term in terms if term.ahead is not None), None)


@dataclass(frozen=True)
class Passage:
    """The start of one sample.

    Attributes:
        t: number of the sample.
        tokens: of the text, [n].
        places: where in it the predicted tokens stand, ascending, at most TOKENS.
        labels: these tokens.
        shown: what the model is shown there; None of a model that is shown all that comes before.
    """

    t: int
    tokens: list[int]
    places: list[int]
    labels: list[int]
    shown: list[int] | None

    def in_text(self, tokenizer: Any, guesses: Sequence[int]) -> dict[str, Any]:
        """Write the passage as pieces of text, those that are predicted with what the model tells there."""
        tokens = list(self.tokens)
        while len(tokens) > 1 and tokens[-1] == tokenizer.pad_token_id and len(tokens) - 1 not in self.places:
            tokens.pop()  # the row of a short document
        cuts = sorted({0, *self.places, *(place + 1 for place in self.places), len(tokens)})
        texts = decode_runs(tokenizer, tokens, cuts[1:])
        pieces = []
        for (begin, _), text in zip(pairwise(cuts), texts, strict=True):
            piece: dict[str, Any] = {"text": text}
            if begin in self.places:
                number = self.places.index(begin)
                if self.shown is not None:
                    piece["shown"] = self._as_it_reads(tokenizer, begin, self.shown[number])
                piece["answer"] = self._as_it_reads(tokenizer, begin, guesses[number])
                piece["right"] = guesses[number] == self.labels[number]
            pieces.append(piece)
        return {"t": self.t, "pieces": pieces}

    def _as_it_reads(self, tokenizer: Any, place: int, token: int) -> str:
        """Decode a token in a place of the text; one that is no text by itself is named as its tokenizer names it."""
        *_, text = decode_runs(tokenizer, [*self.tokens[:place], token], [place, place + 1] if place else [1])
        return text if text.strip("\ufffd") else tokenizer.convert_ids_to_tokens(token) or f"[{token}]"


class ExampleGuesses:
    """The guesses of one evaluation for the examples, on a rank.

    Args:
        samples: how many validation samples there are.
    """

    def __init__(self, term: Term, samples: int) -> None:
        self._term, self._samples = term, min(SAMPLES, samples)
        self._guesses = np.zeros((SAMPLES, TOKENS))

    def add(self, first: int, batch: Batch, predicted: Mapping[str, Predicted]) -> None:
        """Note those of the samples from `first` on, on the host; others leave no trace, and cost nothing."""
        if first >= self._samples:
            return
        guesses = predicted[self._term.name].guesses
        assert guesses is not None, "this is an evaluation"
        rows = guesses.view(batch.rows, -1)[: self._samples - first].cpu().numpy()
        for row, of_row in enumerate(rows):
            columns = _told(batch, row, self._term)
            self._guesses[first + row, : len(columns)] = of_row[columns]

    def numbers(self) -> list[float]:
        """List them as numbers, 0 for what other ranks have: their sum over the ranks is the guesses of all."""
        return self._guesses.flatten().tolist()


def passages(term: Term, batch: Batch, samples: int) -> list[Passage]:
    """Make the examples.

    Args:
        batch: of the first samples, on the host.
        samples: how many of its rows to take.
    """
    return [_passage(batch, row, term) for row in range(samples)]


def texts(passages: Sequence[Passage], tokenizer: Any, numbers: Sequence[float]) -> list[dict[str, Any]]:
    """Write the examples, with the sums over all ranks of `ExampleGuesses.numbers`."""
    guesses = np.asarray(numbers).reshape(SAMPLES, TOKENS).astype(np.int64)
    return [passage.in_text(tokenizer, guesses[passage.t].tolist()) for passage in passages]


def _told(batch: Batch, row: int, term: Term) -> np.ndarray:
    """Choose what is shown of a block: int64 [≤ TOKENS], columns of its labels, in the order of their places."""
    labels, places = _of_row(batch, row, term)
    chosen = np.flatnonzero((labels != IGNORED_LABEL) & (places < min(_WINDOW, batch.inputs["input_ids"].shape[1])))
    chosen = chosen[np.argsort(places[chosen], kind="stable")]
    # Nothing is hidden from a causal model, which tells every token: some of them, spread over the passage.
    every = max(1, len(chosen) // TOKENS) if term.ahead else 1
    return chosen[every - 1 :: every][:TOKENS]


def _of_row(batch: Batch, row: int, term: Term) -> tuple[np.ndarray, np.ndarray]:
    """Read the labels of a block, and where in it these tokens stand: int64 [n] both."""
    labels = batch.labels[term.name].view(batch.rows, -1)[row].numpy()
    seq_len = batch.inputs["input_ids"].shape[1]
    index = batch.prediction_index
    places = np.arange(seq_len) if index is None else index.view(batch.rows, -1)[row].numpy() % seq_len
    assert term.ahead is not None
    return labels, places + term.ahead


def _passage(batch: Batch, row: int, term: Term) -> Passage:
    shown = batch.inputs["input_ids"][row].numpy()
    labels, places = _of_row(batch, row, term)
    text, inside = shown.copy(), (labels != IGNORED_LABEL) & (places < len(shown))
    text[places[inside]] = labels[inside]
    columns = _told(batch, row, term)
    last = int(places[columns[-1]]) if len(columns) else _WINDOW
    end = min(last + 1 + _AFTER, len(text))
    return Passage(
        t=row,
        tokens=text[:end].tolist(),
        places=places[columns].tolist(),
        labels=labels[columns].tolist(),
        shown=None if term.ahead else shown[places[columns]].tolist(),
    )
