"""The probe without a model: batches, means, folds, and a classifier whose answers are known."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from sklearn.model_selection import StratifiedKFold

from trainer.errors import UserError
from trainer.evaluation.probe import TextBatch, batches_of, cross_validate, features_of, mean_over_tokens
from trainer.inputs.probe import need_scikit_learn
from trainer.tracking.metrics import PROBE_METRICS

CPU = torch.device("cpu")


def test_each_text_is_in_one_batch_of_texts_of_its_length() -> None:
    lengths = np.random.default_rng(0).integers(1, 101, 300).tolist()
    batches = batches_of(lengths, longest=100, rows=4)
    assert sorted(np.concatenate([batch.texts for batch in batches]).tolist()) == list(range(300))
    assert {batch.length for batch in batches} == {8, 16, 32, 64, 100}, "a power of two, or what the model can take"
    for texts, length in batches:
        assert all(lengths[text] <= length for text in texts)
        assert length == 8 or all(lengths[text] > length // 2 for text in texts)
        assert len(texts) * length <= 4 * 100
    assert len(batches) < 2 * sum(-(-lengths.count(number) // 4) for number in set(lengths))
    assert batches_of([7], longest=7, rows=1)[0].length == 7


def test_states_are_averaged_over_tokens_and_padding_does_not_count() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3, 5, 4, generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    expected = [states[0].mean(0), states[1, :2].mean(0), states[2, 0]]
    states[1, 3], states[2, 1:] = math.nan, math.inf
    assert torch.allclose(mean_over_tokens(states, mask), torch.stack(expected), atol=1e-6)
    assert mean_over_tokens(states.bfloat16(), mask).dtype == torch.float32


def test_a_batch_is_padded_at_its_ends_and_told_so() -> None:
    tokens = [np.array([5, 6, 7]), np.array([8]), np.array([9, 9])]
    given = {}

    def states_of(inputs):
        given.update(inputs)
        return inputs["input_ids"].unsqueeze(-1).double()

    found = features_of(states_of, TextBatch(np.array([2, 0]), 4), tokens, 1, CPU)
    assert given["input_ids"].tolist() == [[9, 9, 1, 1], [5, 6, 7, 1]]
    assert given["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]]
    assert found.tolist() == [[9.0], [6.0]]


def made(rows: int, classes: int, width: int = 16, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Noise, with a class for each row that has nothing to do with it."""
    generator = np.random.default_rng(seed)
    return generator.standard_normal((rows, width)).astype(np.float32), generator.permutation(rows) % classes


def test_classes_that_a_plane_divides_are_all_told() -> None:
    features, labels = made(120, 3)
    features[:, 5] += 1000.0  # a constant, which standardizing takes away
    features[np.arange(120), labels] += 20.0
    found = cross_validate(features * np.logspace(-4, 4, 16, dtype=np.float32), labels, 5)
    assert found.accuracy == found.macro_f1 == 1.0 and found.accuracy_std == found.macro_f1_std == 0.0
    assert found.majority == pytest.approx(1 / 3)


def test_labels_that_have_nothing_to_do_with_the_texts_are_told_as_by_chance() -> None:
    features, labels = made(2000, 4)
    found = cross_validate(features, labels, 5)
    assert found.accuracy == pytest.approx(0.25, abs=3 * math.sqrt(0.25 * 0.75 / 2000))
    labels[:1200] = 0
    found = cross_validate(features, labels, 5)
    assert found.majority == np.mean(labels == 0) > 0.6
    assert found.accuracy == pytest.approx(found.majority, abs=0.02) and found.macro_f1 < 0.25


def test_accuracy_and_f1_are_those_of_the_one_sign_that_there_is() -> None:
    """A sign tells the class of four texts of five: so it is told, and the folds' figures are those of the sign."""
    labels = np.arange(200) % 2
    signs = np.where(np.random.default_rng(1).permutation(200) < 40, 1 - labels, labels)
    found = cross_validate((2.0 * signs - 1.0)[:, None].astype(np.float32), labels, 4)
    accuracies, f1s = [], []
    for _, texts in StratifiedKFold(4, shuffle=True, random_state=0).split(labels, labels):
        told, true = signs[texts], labels[texts]
        accuracies.append(np.mean(told == true))
        hits = [np.sum((told == number) & (true == number)) for number in (0, 1)]
        f1s.append(np.mean([2 * hits[n] / (np.sum(told == n) + np.sum(true == n)) for n in (0, 1)]))
    assert found.accuracy == pytest.approx(0.8) and found.accuracy_std == pytest.approx(np.std(accuracies))
    assert found.macro_f1 == pytest.approx(np.mean(f1s)) and found.macro_f1_std == pytest.approx(np.std(f1s))
    assert found.accuracy_std > 0


def test_it_is_a_function_of_its_arguments_and_leaves_other_draws_alone() -> None:
    features, labels = made(200, 3)
    np.random.seed(7)
    torch.manual_seed(7)
    expected = np.random.random(), float(torch.rand(()))
    np.random.seed(7)
    torch.manual_seed(7)
    found = [cross_validate(features, labels, 5) for _ in range(2)]
    assert (np.random.random(), float(torch.rand(()))) == expected
    assert found[0] == found[1] != cross_validate(features, labels, 4)


def test_states_that_are_not_finite_have_no_figures() -> None:
    features, labels = made(20, 2)
    features[3, 3] = math.nan
    found = cross_validate(features, labels, 5).metrics()
    assert found.keys() == PROBE_METRICS.keys()
    assert [name for name, value in found.items() if not math.isnan(value)] == ["eval/probe/majority"]


def test_without_scikit_learn_there_is_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    need_scikit_learn("here")
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(UserError, match="scikit-learn, which is not installed") as caught:
        need_scikit_learn("eval.probe.path=my.csv")
    assert "pip install scikit-learn" in caught.value.remedy and caught.value.where == "eval.probe.path=my.csv"
