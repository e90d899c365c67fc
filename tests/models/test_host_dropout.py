"""Dropout on the CPU: the share asked for, scaled so that means stay, and attention that is sdpa's but for it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as functional
from torch import nn
from transformers import AutoModelForMaskedLM, RobertaConfig

from tests.ranks import TINY_ROBERTA
from trainer.model.cpu_dropout import HostDropout, attention_with_dropout, draw_kept, seed_dropout, use_host_dropout


@pytest.mark.parametrize("probability", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_share_that_is_kept(probability: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    kept, share = draw_kept(torch.Size((1001, 999)), probability, dtype)
    assert kept.shape == (1001, 999) and kept.dtype == dtype and set(kept.unique().tolist()) == {0.0, 1.0}
    assert share == pytest.approx(1 - probability, abs=1 / 65536)
    deviation = (probability * (1 - probability) / kept.numel()) ** 0.5
    assert float(kept.float().mean()) == pytest.approx(share, abs=5 * deviation)
    values = kept.float() - share  # each of the four lanes of 64 bits, and neighbours, know nothing of each other
    for apart in (1, 2, 3, 4):
        flat = values.flatten()
        assert abs(float((flat[:-apart] * flat[apart:]).mean())) < 5 * deviation**2 * kept.numel() ** 0.5
    for lane in range(4):
        assert float(kept.flatten()[lane::4].float().mean()) == pytest.approx(share, abs=10 * deviation)


def test_dropout_follows_torchs_seed_and_keeps_the_mean() -> None:
    dropout, ones = HostDropout(0.1), torch.ones(400, 500, requires_grad=True)
    torch.manual_seed(3)
    once = dropout(ones)
    again = dropout(ones)
    torch.manual_seed(3)
    assert torch.equal(dropout(ones), once) and not torch.equal(once, again)
    assert float(once.detach().mean()) == pytest.approx(1.0, abs=0.005)
    once.sum().backward()
    assert torch.equal(ones.grad, once.detach()), "the gradient is dropped and scaled alike"
    assert dropout.eval()(ones) is ones


def test_attention_is_sdpas_but_for_what_is_dropped() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 16, 8, requires_grad=True) for _ in range(3))
    mask = torch.ones(2, 1, 16, 16, dtype=torch.bool).tril()
    for attention_mask in (None, mask):
        few, _ = attention_with_dropout(nn.Module(), query, key, value, attention_mask, dropout=1e-6)
        exact = functional.scaled_dot_product_attention(query, key, value, attention_mask).transpose(1, 2)
        torch.testing.assert_close(few, exact)
        ours, theirs = (
            torch.autograd.grad((out * torch.arange(8.0)).sum(), (query, key, value)) for out in (few, exact)
        )
        torch.testing.assert_close(ours, theirs)
    mean = torch.stack(
        [attention_with_dropout(nn.Module(), query, key, value, mask, dropout=0.3)[0].detach() for _ in range(4000)]
    ).mean(dim=0)
    exact = functional.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2)
    torch.testing.assert_close(mean, exact.detach(), atol=0.08, rtol=0)


def test_a_model_keeps_its_class_and_weights_and_computes_the_same_when_nothing_is_dropped() -> None:
    config = RobertaConfig(**TINY_ROBERTA, vocab_size=100)
    model = AutoModelForMaskedLM.from_config(config, attn_implementation="sdpa").eval()
    names, ids = list(model.state_dict()), torch.randint(5, 100, (2, 32))
    before = model(input_ids=ids).logits
    use_host_dropout(model)
    assert list(model.state_dict()) == names
    assert not any(type(module) is nn.Dropout for module in model.modules())
    assert torch.equal(model(input_ids=ids).logits, before)
    model.train()
    torch.manual_seed(1)
    dropped = model(input_ids=ids).logits
    torch.manual_seed(1)
    assert torch.equal(model(input_ids=ids).logits, dropped) and not torch.allclose(dropped, before)


@pytest.mark.parametrize("dropped", [0.0, 1e-6])  # the second is rounded to nothing, by the way of dropout
def test_a_mask_that_is_added_does_what_one_of_booleans_does(dropped: float) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 7, 8)
    allowed = torch.rand(2, 1, 7, 7) < 0.7
    allowed |= torch.eye(7, dtype=torch.bool)
    added = torch.zeros(2, 1, 7, 7).masked_fill(~allowed, torch.finfo(torch.float32).min)
    module = nn.Module()
    by_boolean, by_sum = (
        attention_with_dropout(module, query, key, value, mask, dropped)[0] for mask in (allowed, added)
    )
    torch.testing.assert_close(by_sum, by_boolean)


def test_the_seed_is_that_of_torch_for_the_device_that_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(11)
    expected = torch.rand(5)
    seed_dropout(11, torch.device("cpu"))
    assert torch.equal(torch.rand(5), expected)
    gpus = [torch.Generator(), torch.Generator()]
    monkeypatch.setattr(torch.cuda, "default_generators", gpus)
    others = gpus[0].get_state()
    seed_dropout(11, torch.device("cuda", 1))
    assert gpus[1].initial_seed() == 11 and torch.equal(gpus[0].get_state(), others)
    assert torch.equal(torch.rand(5), expected)
