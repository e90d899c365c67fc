"""What is learnt of a teacher: torch's own divergence and cosine, and which positions count."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as functional

from tests.objective_cases import CASES
from tests.unit.objectives.test_contract import ROWS, SEQ_LEN, VOCABULARY, numbers, some_blocks
from trainer.config import TeacherConfig
from trainer.data.batch import Batch
from trainer.data.blocks import IGNORED_LABEL
from trainer.objectives.language_model import LanguageModelLoss
from trainer.objectives.objective import loss_sums, tally
from trainer.objectives.registry import make_samples
from trainer.objectives.soft_cross_entropy import soft_cross_entropies
from trainer.objectives.teacher import TaughtLoss

CLASSES, WIDTH = 300, 16


def kl(logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
    """As DistilBERT's training computes it, for each row."""
    losses = functional.kl_div(
        functional.log_softmax(logits.float() / temperature, dim=-1),
        functional.softmax(targets.float() / temperature, dim=-1),
        reduction="none",
    )
    return losses.sum(dim=1) * temperature**2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 7.5])
def test_losses_and_gradients_are_those_of_torch(dtype: torch.dtype, temperature: float) -> None:
    torch.manual_seed(0)
    logits, targets = ((torch.randn(40, CLASSES) * 4).to(dtype) for _ in range(2))
    weights, results = torch.rand(40), []
    for function in (soft_cross_entropies, kl):
        rows = logits.clone().requires_grad_()
        losses = function(rows, targets, temperature)
        (losses * weights).sum().backward()
        assert rows.grad is not None and rows.grad.dtype == dtype and losses.dtype == torch.float32
        results.append((losses.detach(), rows.grad.float()))
    (ours, our_gradient), (theirs, their_gradient) = results
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6 * temperature**2)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-5, atol=1e-6 if dtype == torch.float32 else 1e-2)


def test_the_mean_is_torchs_batchmean() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(40, CLASSES), torch.randn(40, CLASSES)
    expected = torch.nn.KLDivLoss(reduction="batchmean")(
        functional.log_softmax(logits / 2, dim=-1), functional.softmax(targets / 2, dim=-1)
    )
    torch.testing.assert_close(soft_cross_entropies(logits, targets, 2.0).mean(), 4 * expected, rtol=1e-6, atol=1e-6)


def test_who_agrees_with_the_teacher_has_no_loss_and_no_gradient() -> None:
    logits = (torch.randn(20, CLASSES) * 8).requires_grad_()
    losses = soft_cross_entropies(logits, logits.detach().clone(), 2.0)
    losses.sum().backward()
    assert losses.abs().max() == 0 and logits.grad is not None and logits.grad.abs().max() == 0


def test_a_class_that_the_teacher_lacks_has_probability_0_for_it() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(20, CLASSES), torch.randn(20, CLASSES - 44)
    rows, expected = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    padded = torch.cat([targets, torch.full((20, 44), -1e4)], dim=1)
    kl(expected, padded, 2.0).sum().backward()
    losses = soft_cross_entropies(rows, targets, 2.0)
    losses.sum().backward()
    torch.testing.assert_close(losses, kl(logits, padded, 2.0), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(rows.grad, expected.grad, rtol=1e-5, atol=1e-6)
    assert rows.grad is not None and rows.grad[:, -44:].min() > 0, "its probability is pushed down"


def test_one_matrix_is_kept_for_the_backward_pass_and_written_over() -> None:
    logits, targets = torch.randn(64, 5000, requires_grad=True), torch.randn(64, 5000)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = soft_cross_entropies(logits, targets, 2.0)
    assert sum(tensor.numel() >= logits.numel() for tensor in kept) == 1
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert gradient.data_ptr() == kept[0].data_ptr()


class Toy:
    """Embeddings and a head, as a network or as a teacher; and what torch's own losses make of them."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(CLASSES, WIDTH, generator=generator, requires_grad=True)
        self.head = torch.randn(CLASSES, WIDTH, generator=generator, requires_grad=True)

    def states(self, inputs: Any) -> torch.Tensor:
        return self.table[inputs["input_ids"]]

    def network(self, inputs: Any, index: Any, documents: Any, score: Any, with_states: bool) -> Any:
        states = self.states(inputs)
        rows = states.flatten(0, 1) if index is None else states.flatten(0, 1)[index]
        return SimpleNamespace(logits=score.function(rows @ self.head.T, *score.rows), states=states)

    def __call__(self, inputs: Any, index: Any, documents: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        states = self.states(inputs).detach()
        return states, states.flatten(0, 1) if index is None else states.flatten(0, 1)[index]

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        return rows @ self.head.detach().T


def batch_of(positions: str) -> Batch:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(CLASSES, (3, 8), generator=generator)
    index = torch.tensor([1, 4, 9, 14, 17, 20])
    labels, shown = tokens.flatten()[index].clone(), torch.zeros(24, dtype=torch.int64)
    labels[3], shown[-3:] = IGNORED_LABEL, IGNORED_LABEL
    if positions == "predicted":
        soft = torch.where(labels == IGNORED_LABEL, IGNORED_LABEL, 0)
        return Batch({"input_ids": tokens}, {"mlm": labels, "soft": soft, "cosine": shown}, index)
    spread = torch.full((24,), IGNORED_LABEL)
    spread[index] = labels
    return Batch({"input_ids": tokens}, {"mlm": spread, "soft": shown, "cosine": shown}, None)


@pytest.mark.parametrize("positions", ["predicted", "all"])
def test_the_loss_is_the_sum_of_torchs_three(positions: Any) -> None:
    model, teacher, batch = Toy(1), Toy(2), batch_of(positions)
    settings = TeacherConfig(model="unused", temperature=2.0, positions=positions)
    loss = TaughtLoss(settings, LanguageModelLoss("mlm"), teacher)
    assert [(term.name, term.weight) for term in loss.terms] == [("mlm", 2.0), ("soft", 5.0), ("cosine", 1.0)]
    sums = loss_sums(loss, model.network, batch, 1)[:, 0]
    means = sums / torch.tensor([batch.count(term.name) for term in loss.terms])
    ours = torch.autograd.grad((means * torch.tensor([term.weight for term in loss.terms])).sum(), model.table)[0]

    states, (their_states, _) = model.states(batch.inputs).flatten(0, 1), teacher(batch.inputs, None)
    shown = batch.labels["cosine"] == 0
    where = shown if positions == "all" else torch.zeros(24, dtype=torch.bool)
    if positions == "predicted":
        where[[1, 4, 9, 17, 20]] = True
    logits, targets = states @ model.head.T, teacher.logits(their_states.flatten(0, 1))
    kl_mean = torch.nn.KLDivLoss(reduction="batchmean")(
        functional.log_softmax(logits[where] / 2, dim=-1), functional.softmax(targets[where] / 2, dim=-1)
    )
    cosine = torch.nn.CosineEmbeddingLoss()(
        states[shown], their_states.flatten(0, 1)[shown], torch.ones(int(shown.sum()))
    )
    predicted = [1, 4, 9, 17, 20]
    of_text = functional.cross_entropy(logits[predicted], batch.inputs["input_ids"].flatten()[predicted])
    expected = torch.stack([of_text, 4 * kl_mean, cosine])
    torch.testing.assert_close(means, expected, rtol=1e-6, atol=1e-6)
    (theirs,) = torch.autograd.grad((expected * torch.tensor([2.0, 5.0, 1.0])).sum(), model.table)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_what_has_no_weight_is_no_term() -> None:
    settings = TeacherConfig(model="unused", hard=0.0, cosine=0.0)
    model, teacher, batch = Toy(1), Toy(1), batch_of("predicted")
    loss = TaughtLoss(settings, LanguageModelLoss("mlm"), teacher)
    assert [term.name for term in loss.terms] == ["soft"]
    found = tally(loss, model.network, batch)
    assert found.tolist() == [[0.0, 5.0, 5.0, 0.0, 0.0]], "of itself: no loss, and all five positions agree"


def test_an_evaluation_says_perplexity_and_agreement() -> None:
    loss = TaughtLoss(TeacherConfig(model="unused"), LanguageModelLoss("mlm"), Toy(1))
    found = tally(loss, Toy(1).network, batch_of("predicted"))
    assert found[1].tolist() == [0.0, 5.0, 5.0, 0.0, 0.0]
    assert found[2, 0] == pytest.approx(0.0, abs=1e-5) and found[2, 1:].tolist() == [0.0, 21.0, 0.0, 0.0]


@pytest.mark.parametrize("positions", ["predicted", "all"])
def test_padding_counts_in_no_term_and_the_text_as_without_a_teacher(positions: str) -> None:
    case = CASES["mlm, documents"]
    plain = make_samples(case.config("unused", "unused", "unused"), VOCABULARY, SEQ_LEN)
    objective = {"teacher": {"model": "unused", "positions": positions}}
    taught = make_samples(case.config("unused", "unused", "unused", objective=objective), VOCABULARY, SEQ_LEN)
    blocks = some_blocks(plain)
    before, batch = (each.make_batch(blocks, numbers(), 0) for each in (plain, taught))
    padding = (batch.inputs["input_ids"] == VOCABULARY.pad_id).flatten()
    assert padding.any() and torch.equal(batch.inputs["input_ids"], before.inputs["input_ids"])
    assert torch.equal(batch.labels["cosine"] == IGNORED_LABEL, padding)
    assert batch.count("mlm") == before.count("mlm") > 0
    if positions == "predicted":
        assert torch.equal(batch.labels["mlm"], before.labels["mlm"])
        assert torch.equal(batch.labels["soft"] == IGNORED_LABEL, batch.labels["mlm"] == IGNORED_LABEL)
        return
    assert batch.prediction_index is None and torch.equal(batch.labels["soft"], batch.labels["cosine"])
    counted = before.labels["mlm"] != IGNORED_LABEL
    assert before.prediction_index is not None
    places = before.prediction_index[counted]
    assert torch.equal(batch.labels["mlm"][places], before.labels["mlm"][counted])
    left = np.arange(ROWS) != 1
    batch.leave_out(left)
    assert batch.count("cosine") == int((~padding.view(ROWS, -1)[1]).sum())
