"""What holds for every objective's batches: pure functions of (seed, t, position), in shapes that never change."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.objective_cases import CASES
from trainer.data.batch import Batch, Samples
from trainer.data.blocks import DOCUMENT_STARTS, IGNORED_LABEL, Blocks
from trainer.data.tokenizer import Vocabulary
from trainer.evaluation.examples import SAMPLES, TOKENS, ExampleGuesses, passages, shown_term
from trainer.objectives.objective import Predicted
from trainer.objectives.registry import OBJECTIVES, make_criterion, make_samples
from trainer.sizing.made_up import made_up_batch

GOLDEN = Path(__file__).parents[2] / "golden" / "objectives_v1.json"
ROWS, SEQ_LEN = 6, 32
SPECIAL = (0, 1, 2, 3, 4)
VOCABULARY = Vocabulary(1000, 0, 2, 2, 4, 1, SPECIAL, "")
every_case = pytest.mark.parametrize("name", CASES)


def samples_of(name: str) -> Samples:
    return make_samples(CASES[name].config("unused", "unused", "unused"), VOCABULARY, SEQ_LEN)


def some_blocks(samples: Samples, rows: int = ROWS, seed: int = 0) -> Blocks:
    """Blocks as a reader hands them over, with two documents and some marks in each."""
    generator = np.random.default_rng(seed)
    view = samples.view
    width = view.payload + (1 if view.whole_documents else view.lookahead)

    def stretch(width: int) -> Blocks:
        tokens = generator.integers(5, 1000, (rows, width))
        starts = {mark: generator.random((rows, width)) < 0.6 for mark in samples.marks}
        middle = width // 2
        tokens[:, middle] = VOCABULARY.separator_id
        if DOCUMENT_STARTS in starts:
            starts[DOCUMENT_STARTS][:] = False
            starts[DOCUMENT_STARTS][:, [0, middle + 1]] = True
        if not view.whole_documents:
            return Blocks(tokens, starts)
        return Blocks(tokens, starts, np.full(rows, width - 3), np.zeros((rows, 2), np.bool_))

    blocks = stretch(width)
    if not view.partner:
        return blocks
    partner = stretch(2 * view.payload)
    return blocks._replace(partner=partner._replace(lengths=np.full(rows, 2 * view.payload)))


def numbers(rows: int = ROWS, first: int = 0) -> np.ndarray:
    return np.arange(first, first + rows, dtype=np.uint64)


def row_of(blocks: Blocks, row: int) -> Blocks:
    def cut(each: Blocks) -> Blocks:
        starts = {mark: marked[row : row + 1] for mark, marked in each.starts.items()}
        lengths, cuts = (None if part is None else part[row : row + 1] for part in (each.lengths, each.cuts))
        return each._replace(tokens=each.tokens[row : row + 1], starts=starts, lengths=lengths, cuts=cuts)

    return cut(blocks)._replace(partner=None if blocks.partner is None else cut(blocks.partner))


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    found = {**batch.inputs, **{f"labels of {term}": labels for term, labels in batch.labels.items()}}
    return found if batch.prediction_index is None else {**found, "index": batch.prediction_index}


def test_every_registered_objective_is_here() -> None:
    assert {case.objective["name"] for case in CASES.values()} == set(OBJECTIVES)


@every_case
def test_a_row_is_what_it_is_alone(name: str) -> None:
    samples = samples_of(name)
    blocks = some_blocks(samples)
    together = tensors(samples.make_batch(blocks, numbers(first=70), seed=3))
    for row in range(ROWS):
        alone = tensors(samples.make_batch(row_of(blocks, row), numbers(1, 70 + row), seed=3))
        for key, whole in together.items():
            part = whole.view(ROWS, -1)[row]
            if key == "index":
                part = part - row * SEQ_LEN
            assert torch.equal(alone[key].view(-1), part), (key, row)


@every_case
def test_shapes_depend_on_nothing_but_the_rows(name: str) -> None:
    samples = samples_of(name)
    made = [samples.make_batch(some_blocks(samples, seed=seed), numbers(first=seed << 40), seed) for seed in range(5)]
    made.append(made_up_batch(samples, ROWS))
    shapes = {tuple((key, tuple(value.shape)) for key, value in tensors(each).items()) for each in made}
    assert len(shapes) == 1
    batch = samples.make_batch(some_blocks(samples), numbers(), 0)
    assert batch.head_rows == ROWS * samples.head_rows
    assert all(len(labels) % ROWS == 0 for labels in batch.labels.values())


@every_case
def test_the_same_sample_is_the_same_batch_and_another_visit_another_one(name: str) -> None:
    samples, draws = samples_of(name), not name.startswith("clm")
    blocks = some_blocks(samples)
    first, again, other_visit, other_seed = (
        tensors(samples.make_batch(blocks, numbers(first=t), seed)) for t, seed in ((5, 1), (5, 1), (500, 1), (5, 2))
    )
    assert all(torch.equal(first[key], again[key]) for key in first)
    for other in (other_visit, other_seed):
        assert any(not torch.equal(first[key], other[key]) for key in first) == draws


@every_case
def test_terms_have_labels_and_a_row_that_is_left_out_has_none(name: str) -> None:
    samples = samples_of(name)
    batch = samples.make_batch(some_blocks(samples), numbers(), 0)
    terms = make_criterion(CASES[name].config("unused", "unused", "unused")).terms
    assert [term.name for term in terms] == list(batch.labels)
    assert all(batch.count(term.name) > 0 for term in terms)
    left = np.arange(ROWS) != 2
    batch.leave_out(left)
    for labels in batch.labels.values():
        assert (labels.view(ROWS, -1)[torch.from_numpy(left)] == IGNORED_LABEL).all()


@every_case
def test_examples_are_passages_of_the_text_with_the_guesses_at_its_tokens(name: str) -> None:
    samples = samples_of(name)
    term = shown_term(make_criterion(CASES[name].config("unused", "unused", "unused")).terms)
    assert term is not None
    blocks, found = some_blocks(samples), []
    for first in (0, 500):
        batch = samples.make_batch(blocks, numbers(first=first), 0)
        labels = batch.labels[term.name]
        guesses = ExampleGuesses(term, samples=100)
        guesses.add(0, batch, {term.name: Predicted(torch.zeros(len(labels)), labels + 10_000)})
        told = np.array(guesses.numbers()).reshape(SAMPLES, TOKENS)
        found.append(passages(term, batch, SAMPLES))
        for passage, row in zip(found[-1], told, strict=True):
            count = len(passage.places)
            assert 0 < count <= TOKENS and passage.places == sorted(set(passage.places))
            assert [passage.tokens[place] for place in passage.places] == passage.labels
            assert row.tolist() == [label + 10_000 for label in passage.labels] + [0] * (TOKENS - count)
            assert (passage.shown is None) == name.startswith("clm")
    if CASES[name].objective.get("pair") is None:  # which are drawn, too
        for one, other in zip(*found, strict=True):
            assert all(token == same for token, same in zip(one.tokens, other.tokens, strict=False)), (
                "no masks are left"
            )


def test_examples_of_other_ranks_add_up() -> None:
    """Each rank notes those of its samples, in whatever pass; together they are what one rank notes."""
    samples, (term, *_) = samples_of("mlm"), make_criterion(CASES["mlm"].config("unused", "unused", "unused")).terms
    batch = samples.make_batch(some_blocks(samples), numbers(), 0)
    labels = batch.labels[term.name].view(ROWS, -1)

    def noted(first: int, end: int, size: int = 100) -> np.ndarray:
        part = (
            samples.make_batch(row_of(some_blocks(samples), first), numbers(1, first), 0) if end == first + 1 else batch
        )
        guesses = ExampleGuesses(term, size)
        guesses.add(first, part, {term.name: Predicted(torch.zeros(0), labels[first:end].flatten())})
        return np.array(guesses.numbers())

    assert (sum(noted(row, row + 1) for row in range(ROWS)) == noted(0, ROWS)).all()
    of_three = noted(0, ROWS, size=3).reshape(SAMPLES, TOKENS)
    assert of_three[2].any() and not of_three[3].any(), "beyond the last sample there is padding"


@every_case
def test_golden_batches(name: str) -> None:
    samples = samples_of(name)
    digest = hashlib.sha256()
    for key, value in sorted(tensors(samples.make_batch(some_blocks(samples), numbers(first=1000), 11)).items()):
        digest.update(key.encode() + value.numpy().tobytes())
    assert digest.hexdigest()[:16] == json.loads(GOLDEN.read_text())[name], "old runs would go on with other batches"
