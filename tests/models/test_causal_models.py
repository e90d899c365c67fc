"""Causal classes as they are trained: the stock class's loss and gradients, nothing of the future, no whole logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import cross_entropy

from tests.tiny_models import CAUSAL_ARCHITECTURES, SEQ_LEN, VOCABULARY_SIZE, tiny_model
from trainer.data.batch import Batch
from trainer.model import prediction_head
from trainer.model.forward import Forward
from trainer.objectives.clm import TERM
from trainer.objectives.cross_entropy import cross_entropies
from trainer.objectives.language_model import LanguageModelLoss
from trainer.objectives.objective import loss_sums, tally

CPU = torch.device("cpu")
BLOCKS = 3


def batch() -> Batch:
    tokens = torch.randint(4, VOCABULARY_SIZE, (BLOCKS, SEQ_LEN + 1), generator=torch.Generator().manual_seed(1))
    return Batch({"input_ids": tokens[:, :-1].contiguous()}, {TERM: tokens[:, 1:].reshape(-1)}, None)


def lively(folder: Path, model_type: str) -> Any:
    model = tiny_model(folder, model_type)
    with torch.no_grad():
        for parameter in model.base_model.parameters():
            parameter.mul_(4.0 if parameter.ndim == 2 else 1.0)
    return model


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(params=[1, 4], ids=["logits whole", "logits in pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    rows = BLOCKS * SEQ_LEN
    monkeypatch.setattr(prediction_head, "LOGITS_AT_ONCE", -(-rows * VOCABULARY_SIZE // request.param))
    return request.param


@pytest.mark.parametrize("model_type", [*CAUSAL_ARCHITECTURES, "gptj"])
def test_loss_and_gradients_are_the_stock_class_own(model_type: str, pieces: int, tmp_path: Path) -> None:
    model, made = lively(tmp_path, model_type), batch()
    logits = model(input_ids=made.inputs["input_ids"], use_cache=False).logits
    stock = cross_entropy(logits.flatten(0, 1), made.labels[TERM], reduction="sum")
    stock.backward()
    expected, _ = gradients(model), model.zero_grad()

    forward = Forward(model, CPU)
    rows: list[int] = []

    def kernel(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        rows.append(len(logits))
        return cross_entropies(logits, labels)

    loss = loss_sums(LanguageModelLoss(TERM, kernel), forward, made, 1).sum()
    loss.backward()
    in_pieces = pieces > 1 and model_type in CAUSAL_ARCHITECTURES
    assert rows == [BLOCKS * SEQ_LEN // pieces] * 2 * pieces if in_pieces else [BLOCKS * SEQ_LEN], "again, backward"
    assert abs(loss.item() - stock.item()) < 1e-6 * stock.item()
    found = gradients(model)
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name in expected:
        assert (found[name] - expected[name]).abs().max() < 1e-5 * largest, name


@pytest.mark.parametrize("model_type", CAUSAL_ARCHITECTURES)
def test_an_evaluation_counts_what_is_told_right(model_type: str, pieces: int, tmp_path: Path) -> None:
    model, made = lively(tmp_path, model_type).eval(), batch()
    with torch.no_grad():
        logits = model(input_ids=made.inputs["input_ids"]).logits.flatten(0, 1)
        made.labels[TERM][::3] = logits.argmax(dim=-1)[::3]
    expected = cross_entropy(logits, made.labels[TERM], reduction="sum")
    ((loss, right, count),) = tally(LanguageModelLoss(TERM), Forward(model, CPU), made).tolist()
    assert loss == pytest.approx(float(expected), rel=1e-6)
    assert right == int((logits.argmax(dim=-1) == made.labels[TERM]).sum()) >= count / 3
    assert count == BLOCKS * SEQ_LEN


@pytest.mark.parametrize("model_type", CAUSAL_ARCHITECTURES)
def test_no_logit_depends_on_a_later_token(model_type: str, tmp_path: Path) -> None:
    """As gradients of each position's logits by the embeddings of all."""
    model = lively(tmp_path, model_type).eval()
    forward, ids = Forward(model, CPU), batch().inputs["input_ids"][:1]
    seen: list[torch.Tensor] = []
    table = model.get_input_embeddings()

    def keep(_module: Any, _args: Any, embedded: torch.Tensor) -> torch.Tensor:
        seen[:] = [embedded.detach().requires_grad_()]
        return seen[0]

    hook = table.register_forward_hook(keep)
    for position in (0, 5, SEQ_LEN - 2):
        logits = forward({"input_ids": ids}, torch.tensor([position])).logits
        logits.square().sum().backward()
        gradient = seen[0].grad
        assert gradient is not None
        reach = gradient[0].abs().amax(dim=-1) > 0
        assert reach[: position + 1].all() or model_type == "modernbert-decoder", "it sees what is before it"
        assert reach[position] and not reach[position + 1 :].any()
    hook.remove()


@pytest.mark.parametrize("model_type", CAUSAL_ARCHITECTURES)
def test_one_graph_serves_all_batches(model_type: str, pieces: int, tmp_path: Path) -> None:
    model, made = lively(tmp_path, model_type), batch()
    forward, criterion = Forward(model, CPU), LanguageModelLoss(TERM)
    eager = loss_sums(criterion, forward, made, 1)
    eager.sum().backward()
    expected, _ = gradients(model), model.zero_grad()
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    model.compile(backend=graphs, fullgraph=True, dynamic=False)
    for shift in (1, 0):
        other = Batch({"input_ids": made.inputs["input_ids"].roll(shift, 0)}, {TERM: made.labels[TERM].clone()}, None)
        model.zero_grad()
        compiled = loss_sums(criterion, forward, other, 1)
        compiled.sum().backward()
    assert graphs.frame_count == 1
    assert torch.allclose(compiled, eager, rtol=1e-5)
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in gradients(model).items():
        assert (gradient - expected[name]).abs().max() < 1e-5 * largest, name
