"""StableAdamW and Muon on whole parameters, against what the papers write; and which rank computes a matrix."""

from __future__ import annotations

import pytest
import torch

from tests.optimizer_reference import ReferenceOptimizer, orthogonal
from trainer.config import OptimizerConfig
from trainer.engine.flat_optimizer import FlatOptimizer, RankPlace
from trainer.engine.matrix_exchange import choose_owners, sent_elements
from trainer.engine.newton_schulz import iteration_flops, orthogonalize, step_scale
from trainer.engine.optimizer import build_optimizer
from trainer.engine.state_layout import FlatLayout, Piece

SHAPES = ((6, 4), (4, 10), (5, 5))


def layers() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Embedding(11, 4), torch.nn.Linear(4, 6), torch.nn.Linear(6, 6))


@pytest.mark.parametrize("name", ["adamw", "stable_adamw", "muon"])
def test_an_update_is_the_papers(name: str) -> None:
    module, matrices = layers(), ["1.weight", "2.weight"]
    settings = OptimizerConfig(name=name, lr=0.1, betas=(0.8, 0.9), weight_decay=0.2, clip=1e9)  # type: ignore[arg-type]
    weights = dict(module.named_parameters())
    reference = ReferenceOptimizer(settings, weights, matrices)
    optimizer = build_optimizer(module, settings, matrices=matrices)
    optimizer.grad_scale = torch.tensor(4.0)  # type: ignore[attr-defined]  # as ZeRO leaves clipping to it
    for step in range(6):
        gradients = {each: torch.randn_like(weight) * 8.0 ** (step % 2) for each, weight in weights.items()}
        for each, weight in weights.items():
            weight.grad = 4 * gradients[each]
        optimizer.step()
        reference.step(gradients)
    for each, weight in weights.items():
        torch.testing.assert_close(weight.detach().double(), reference.weights[each], rtol=2e-5, atol=2e-5)
        state = optimizer.state[weight]
        assert float(state["step"]) == 6
        assert state.keys() - {"step"} == reference.moments[each].keys()
        for kind, moment in reference.moments[each].items():
            torch.testing.assert_close(state[kind].double(), moment, rtol=1e-5, atol=1e-6)


def test_stable_adamw_takes_shorter_steps_where_a_gradient_was_not_foreseen() -> None:
    moved = {}
    for name in ("adamw", "stable_adamw"):
        module = torch.nn.Linear(8, 8, bias=False)
        torch.nn.init.zeros_(module.weight)
        optimizer = build_optimizer(module, OptimizerConfig(name=name, betas=(0.9, 0.99), weight_decay=0))  # type: ignore[arg-type]
        for size in (1e-3, 1e-3, 1.0):
            before = module.weight.detach().clone()
            module.weight.grad = torch.full_like(module.weight, size)
            optimizer.step()
        moved[name] = float((module.weight - before).detach().abs().max())
    # mean(g^2 / û) of the third step: û is (1 - 0.99) / (1 - 0.99^3), near a third, of g^2.
    assert moved["stable_adamw"] == pytest.approx(moved["adamw"] / 3**0.5, rel=0.01)


def test_stable_adamw_leaves_what_has_no_gradient_with_an_eps_whose_square_is_nought_in_fp32() -> None:
    module = torch.nn.Embedding(3, 4)
    before = module.weight.detach().clone()
    optimizer = build_optimizer(module, OptimizerConfig(name="stable_adamw", eps=1e-30, weight_decay=0))
    module.weight.grad = torch.zeros(3, 4)
    module.weight.grad[0] = 1.0
    optimizer.step()
    assert module.weight.isfinite().all() and torch.equal(module.weight[1:], before[1:])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_iteration_is_that_of_the_singular_values(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    lying = matrix.mT if shape[0] > shape[1] else matrix
    found = orthogonalize(lying.unsqueeze(0))[0]
    torch.testing.assert_close(found.double(), orthogonal(lying.double()), rtol=1e-4, atol=1e-5)
    values = torch.linalg.svdvals(found)
    assert float(values.min()) > 0.3 and float(values.max()) < 1.3
    assert step_scale(shape) * float(found.square().mean().sqrt()) == pytest.approx(0.2, rel=0.35)


def test_the_iteration_leaves_nought_nought() -> None:
    assert not orthogonalize(torch.zeros(2, 3, 4)).any()


def test_torchs_muon_updates_alike_in_half_precision() -> None:
    """Its iteration is in bf16, whose noise is all that may be between the two."""
    first, second = (torch.nn.Linear(24, 40, bias=False) for _ in range(2))
    with torch.no_grad():
        second.weight.copy_(first.weight)
    settings = OptimizerConfig(name="muon", lr=0.02, weight_decay=0.1)
    ours = build_optimizer(first, settings, matrices=["weight"])
    theirs = torch.optim.Muon([second.weight], lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    start = first.weight.detach().clone()
    for _ in range(5):
        gradient = torch.randn_like(start)
        first.weight.grad, second.weight.grad = gradient.clone(), gradient.clone()
        ours.step()
        theirs.step()
    moved = (second.weight - start).norm()
    assert float((first.weight - second.weight).detach().norm() / moved.detach()) < 0.02


def cut(shapes: tuple[tuple[int, int], ...], ranks: int) -> FlatLayout:
    """As ZeRO 1 cuts them: end to end, in equal parts."""
    total = sum(n * m for n, m in shapes)
    part, pieces, place = -(-total // ranks), [], 0
    for number, (n, m) in enumerate(shapes):
        for rank in range(ranks):
            first, last = max(place, rank * part), min(place + n * m, (rank + 1) * part)
            if first < last:
                pieces.append(Piece(number, rank, 0, first - place, first - rank * part, last - first))
        place += n * m
    return FlatLayout(shapes, tuple(pieces))


def test_a_matrix_is_computed_where_a_piece_of_it_lies_and_work_is_even() -> None:
    layout = cut(((8, 8),) * 12, 5)
    owners = choose_owners(layout, 5)
    for number, owner in enumerate(owners):
        assert any(piece.parameter == number and piece.rank == owner for piece in layout.pieces)
    assert max(owners.count(rank) for rank in range(5)) == 3
    everywhere = FlatLayout(
        ((8, 8),) * 10, tuple(Piece(each, rank, each, 0, 0, 64) for each in range(10) for rank in range(5))
    )
    assert sorted(choose_owners(everywhere, 5)) == [rank for rank in range(5) for _ in range(2)]
    assert sent_elements(everywhere, 5) == 10 * 64 * 4 / 5, "of what all hold, results alone travel"
    assert sent_elements(cut(((8, 8),) * 10, 5), 5) == 0, "what lies whole does not travel"
    assert sent_elements(cut(((8, 8),) * 3, 2), 2) == 2 * 32 / 2, "half a matrix, there and back"


@pytest.mark.parametrize("name", ["stable_adamw", "muon"])
def test_a_rank_that_has_padding_alone_updates_nothing(name: str) -> None:
    module = torch.nn.Linear(2, 2, bias=False)
    optimizer = build_optimizer(module, OptimizerConfig(name=name, weight_decay=0), matrices=["weight"])  # type: ignore[arg-type]
    assert isinstance(optimizer, FlatOptimizer)
    elsewhere = FlatLayout(((2, 2),), (Piece(0, 0, 0, 0, 0, 4),))
    optimizer.lay_out({module.weight: elsewhere}, RankPlace(1, 2, torch.device("cpu")))
    before = module.weight.detach().clone()
    module.weight.grad = torch.zeros_like(before)
    optimizer.step()
    assert torch.equal(module.weight, before)


def test_the_flops_are_those_of_the_products() -> None:
    assert iteration_flops((3072, 768)) == 5 * (2 * 2 * 768 * 768 * 3072 + 2 * 768**3) == iteration_flops((768, 3072))
