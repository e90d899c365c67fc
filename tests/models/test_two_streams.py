"""XLNet as it is trained: the stock class's loss and gradients, and who sees whom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.tiny_models import SEQ_LEN, VOCABULARY_SIZE, assert_same_gradients, gradients, lively_model, vocabulary
from trainer.config import ObjectiveConfig, OptimizerConfig
from trainer.data.batch import RANKS, Batch
from trainer.data.blocks import IGNORED_LABEL, Blocks
from trainer.data.manifest import WORD_STARTS
from trainer.engine.optimizer import build_optimizer
from trainer.model.forward import Forward
from trainer.objectives.language_model import LanguageModelLoss
from trainer.objectives.objective import loss_sums, tally
from trainer.objectives.plm import TERM, PermutedSamples

CPU = torch.device("cpu")
BLOCKS = 3


def batch(scheme: str = "token", seed: int = 3) -> Batch:
    """Words of three tokens, so that with a scheme of words some rows have a place without a prediction."""
    settings = ObjectiveConfig.model_validate({"name": "plm", "scheme": scheme, "mask_ratio": 0.35})
    samples = PermutedSamples(settings, vocabulary(), SEQ_LEN)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(4, VOCABULARY_SIZE - 1, (BLOCKS, SEQ_LEN - 2), generator=generator).numpy()
    starts = {} if scheme == "token" else {WORD_STARTS: (torch.arange(SEQ_LEN - 2) % 3 == 0).expand(BLOCKS, -1).numpy()}
    return samples.make_batch(Blocks(tokens, starts), torch.arange(BLOCKS).numpy().astype("uint64"), seed)


def by_loops(made: Batch) -> dict[str, torch.Tensor]:
    """What the stock class is given, one position at a time."""
    assert made.prediction_index is not None
    ranks, labels = made.inputs[RANKS].tolist(), made.labels[TERM].view(BLOCKS, -1).tolist()
    index = made.prediction_index.view(BLOCKS, -1).tolist()
    count = len(index[0])
    hidden, target = torch.zeros(BLOCKS, SEQ_LEN, SEQ_LEN), torch.zeros(BLOCKS, count, SEQ_LEN)
    for row in range(BLOCKS):
        for one in range(SEQ_LEN):
            for other in range(SEQ_LEN):
                shown = ranks[row][other] == -1
                before = ranks[row][one] != -1 and ranks[row][other] < ranks[row][one]
                hidden[row, one, other] = 0.0 if shown or before else 1.0
        for place in range(count):
            if labels[row][place] != IGNORED_LABEL:
                target[row, place, index[row][place] - row * SEQ_LEN] = 1.0
    return {"perm_mask": hidden, "target_mapping": target}


@pytest.mark.parametrize("scheme", ["token", "word"])
def test_loss_and_gradients_are_the_stock_class_own(scheme: str, tmp_path: Path) -> None:
    model, made = lively_model(tmp_path, "xlnet"), batch(scheme)
    labels = made.labels[TERM]
    assert (labels == IGNORED_LABEL).any() == (scheme == "word")
    logits = model(input_ids=made.inputs["input_ids"], **by_loops(made)).logits
    stock = cross_entropy(logits.flatten(0, 1), labels, reduction="sum")
    stock.backward()
    expected, _ = gradients(model), model.zero_grad()

    loss = loss_sums(LanguageModelLoss(TERM), Forward(model, CPU), made, 1).sum()
    loss.backward()
    assert abs(loss.item() - stock.item()) < 1e-6 * stock.item()
    assert_same_gradients(gradients(model), expected)


@pytest.mark.parametrize("scheme", ["token", "word"])
def test_a_prediction_sees_what_is_not_predicted_and_what_comes_before_it(scheme: str, tmp_path: Path) -> None:
    """As gradients of each prediction's logits by the embeddings of all tokens."""
    model, made = lively_model(tmp_path, "xlnet").eval(), batch(scheme)
    assert made.prediction_index is not None
    forward, seen = Forward(model, CPU), []

    def keep(_module: Any, _args: Any, embedded: torch.Tensor) -> torch.Tensor:
        seen[:] = [embedded.detach().requires_grad_()]
        return seen[0]

    model.get_input_embeddings().register_forward_hook(keep)
    reached_before = 0
    for row, position in enumerate(made.prediction_index.tolist()):
        if made.labels[TERM][row] == IGNORED_LABEL:
            continue
        logits = forward(made.inputs, made.prediction_index).logits
        logits[row].square().sum().backward()
        ranks = made.inputs[RANKS]
        block = position // SEQ_LEN
        expected = torch.zeros(BLOCKS, SEQ_LEN, dtype=torch.bool)
        expected[block] = ranks[block] < ranks[block, position % SEQ_LEN]
        # [S, B, H]: the class has positions first
        assert torch.equal(seen[0].grad.abs().amax(dim=-1).T > 0, expected)
        reached_before += int((expected & (ranks >= 0)).sum())
    assert reached_before > 10, "tokens that are predicted are seen by others"


def test_a_row_alone_gives_what_it_gives_in_its_batch(tmp_path: Path) -> None:
    forward, made = Forward(lively_model(tmp_path, "xlnet").eval(), CPU), batch("word")
    assert made.prediction_index is not None
    with torch.no_grad():
        together = forward(made.inputs, made.prediction_index).logits.view(BLOCKS, -1, VOCABULARY_SIZE)
        for row in range(BLOCKS):
            one = {name: value[row : row + 1] for name, value in made.inputs.items()}
            index = made.prediction_index.view(BLOCKS, -1)[row] - row * SEQ_LEN
            assert torch.allclose(forward(one, index).logits, together[row], atol=1e-5)


def test_places_without_a_prediction_disturb_no_other(tmp_path: Path) -> None:
    forward, made = Forward(lively_model(tmp_path, "xlnet").eval(), CPU), batch("word")
    assert made.prediction_index is not None
    row = int((made.labels[TERM].view(BLOCKS, -1) == IGNORED_LABEL).any(dim=1).nonzero()[0])
    counted = made.labels[TERM].view(BLOCKS, -1)[row] != IGNORED_LABEL
    one = {name: value[row : row + 1] for name, value in made.inputs.items()}
    index = made.prediction_index.view(BLOCKS, -1)[row] - row * SEQ_LEN
    with torch.no_grad():
        logits = forward(one, index).logits[counted]
        assert torch.allclose(forward(one, index[counted]).logits, logits, atol=1e-5)


def test_an_evaluation_counts_what_is_told_right(tmp_path: Path) -> None:
    model, made = lively_model(tmp_path, "xlnet").eval(), batch("word")
    labels = made.labels[TERM]
    with torch.no_grad():
        logits = model(input_ids=made.inputs["input_ids"], use_mems=False, **by_loops(made)).logits.flatten(0, 1)
        counted = labels != IGNORED_LABEL
        labels[::3] = torch.where(counted[::3], logits.argmax(dim=-1)[::3], IGNORED_LABEL)
    expected = cross_entropy(logits, labels, reduction="sum")
    ((loss, right, count, *_),) = tally(LanguageModelLoss(TERM), Forward(model, CPU), made).tolist()
    assert loss == pytest.approx(float(expected), rel=1e-6)
    assert right == int((logits.argmax(dim=-1) == labels).sum()) > 0 and count == int(counted.sum())


def test_in_bf16_it_is_the_same_but_for_rounding(tmp_path: Path) -> None:
    """transformers alone cannot: its positions stay in fp32."""
    made, losses = batch(), []
    for dtype in (torch.float32, torch.bfloat16):
        losses.append(
            loss_sums(LanguageModelLoss(TERM), Forward(lively_model(tmp_path, "xlnet").to(dtype), CPU), made, 1).sum()
        )
        losses[-1].backward()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=2e-2)


def test_one_graph_serves_all_batches(tmp_path: Path) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    model, made = lively_model(tmp_path, "xlnet"), batch()
    forward, criterion = Forward(model, CPU), LanguageModelLoss(TERM)
    eager = loss_sums(criterion, forward, made, 1)
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    model.compile(backend=graphs, fullgraph=True, dynamic=False)
    for other in (batch(seed=4), made):
        compiled = loss_sums(criterion, forward, other, 1)
        compiled.sum().backward()
    assert graphs.frame_count == 1
    assert torch.allclose(compiled, eager, rtol=1e-5)


def test_biases_and_what_has_no_gradient_are_not_decayed(tmp_path: Path) -> None:
    """XLNet's biases have two dimensions; its segments are not given, so their weights would only shrink."""
    model, made = lively_model(tmp_path, "xlnet"), batch()
    loss_sums(LanguageModelLoss(TERM), Forward(model, CPU), made, 1).sum().backward()
    decayed, others = (
        {id(p) for p in group["params"]} for group in build_optimizer(model, OptimizerConfig()).param_groups
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert {name.rpartition(".")[2] for name in without} >= {"seg_embed", "r_s_bias"}
    assert not without & {names[each] for each in decayed}
    assert {names[each].rpartition(".")[2] for each in others} >= {"r_w_bias", "r_r_bias", "bias"}
    assert {names[each].rpartition(".")[2] for each in decayed} == {"weight", "q", "k", "v", "o", "r"}
