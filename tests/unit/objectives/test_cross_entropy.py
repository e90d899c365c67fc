"""The cross-entropy of the training step is torch's, gradients included, with one matrix less than torch holds."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as functional

from trainer.data.blocks import IGNORED_LABEL
from trainer.objectives.cross_entropy import cross_entropies


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_are_those_of_torch(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(40, 300) * 4).to(dtype)
    labels = torch.randint(300, (40,))
    labels[::7] = IGNORED_LABEL
    weights = torch.rand(40)
    results = []
    for function in (
        cross_entropies,
        lambda rows, labels: functional.cross_entropy(rows.float(), labels, reduction="none"),
    ):
        rows = logits.clone().requires_grad_()
        losses = function(rows, labels)
        (losses * weights).sum().backward()
        assert rows.grad is not None and rows.grad.dtype == dtype
        results.append((losses.detach(), rows.grad.float()))
    (ours, our_gradient), (theirs, their_gradient) = results
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-5, atol=1e-7 if dtype == torch.float32 else 1e-3)


def test_a_label_that_is_far_off_has_a_finite_loss_and_an_impossible_one_an_infinite() -> None:
    logits = torch.tensor([[0.0, 200.0, -3.0], [0.0, -math.inf, 1.0], [math.nan, 0.0, 0.0]])
    losses = cross_entropies(logits, torch.tensor([0, 1, 1]))
    assert losses[0] == pytest.approx(200.0) and losses[1] == math.inf and losses[2].isnan()


def test_the_backward_pass_writes_over_the_probabilities() -> None:
    logits = torch.randn(64, 5000, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        cross_entropies(logits, torch.arange(64)).sum().backward()
    matrix = logits.numel() * 4
    allocated = [event.self_cpu_memory_usage for event in profile.events() if event.self_cpu_memory_usage >= matrix]
    assert len(allocated) == 1, "the probabilities are all that is allocated of this size"
