"""torch.compile: enough graphs for a run, a loud line when not, and no graph of another attention kernel."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch._dynamo
import torch.nn.functional as functional
from torch import nn
from torch._inductor.codecache import compiled_fx_graph_hash

from tests.ranks import tiny_config
from trainer.model.attention_backend import preferring
from trainer.model.compiling import compile_options, expect_shapes, forget_graphs
from trainer.schedule.batch_plan import plan_batch
from trainer.schedule.phases import lay_out

SHAPES = 20


@pytest.fixture(autouse=True)
def own_graphs() -> Iterator[None]:
    limit = torch._dynamo.config.recompile_limit
    forget_graphs()
    yield
    torch._dynamo.config.recompile_limit = limit
    forget_graphs()


class Counting:
    """A backend of torch.compile that counts the graphs that it is given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, module: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        self.graphs += 1
        return module


def run_shapes(module: nn.Module, count: int) -> int:
    """Graphs that are made for so many lengths of a batch."""
    backend = Counting()
    compiled = torch.compile(module, backend=backend, dynamic=False)
    for length in range(1, count + 1):
        compiled(torch.ones(length, 4))
    return backend.graphs


def test_each_shape_of_a_run_gets_its_graph_and_those_of_a_trial_take_none_away() -> None:
    """Gpu A4: the limit holds for a code object, so all engines of a process share it."""
    assert run_shapes(nn.Linear(4, 4), SHAPES) < SHAPES, "else nothing is shown here"
    forget_graphs()
    expect_shapes(SHAPES)
    assert run_shapes(nn.Linear(4, 4), SHAPES) == SHAPES
    assert run_shapes(nn.Linear(4, 4), SHAPES) < SHAPES, "a second engine, as after a trial"
    forget_graphs()
    assert run_shapes(nn.Linear(4, 4), SHAPES) == SHAPES


def test_a_limit_that_is_reached_is_a_loud_line(caplog: pytest.LogCaptureFixture) -> None:
    expect_shapes(2)
    with caplog.at_level(logging.WARNING, "trainer"):
        run_shapes(nn.Linear(4, 4), 2)
        assert "COMPILE LIMIT REACHED" not in caplog.text
        run_shapes(nn.Linear(4, 4), SHAPES)
    assert caplog.text.count("COMPILE LIMIT REACHED") == 1


def test_a_plan_counts_its_shapes(tmp_path: Path) -> None:
    phases = [{"seq_len": 16, "until_tokens": 640}, {"seq_len": 24, "until_tokens": 1600}]
    data = {"train": "x", "seq_len": 32, "phases": phases}
    for sections, count in (({"data": data}, 3), ({"data": {**data, "phases": []}}, 1)):
        config = tiny_config(tmp_path, tmp_path / "run", **sections)
        plan = plan_batch(config.batch, config.train, lay_out(config.data, config.batch), 1, [100, 100, 100])
        assert plan.shape_count == 2 * count, "in training and in evaluation"


def attend(query: torch.Tensor) -> torch.Tensor:
    return functional.scaled_dot_product_attention(query, query, query)


def test_a_graph_of_one_attention_kernel_is_never_taken_for_another() -> None:
    """Gpu A5: neither a guard of Dynamo nor the key of Inductor's cache knows which kernel tracing has settled."""
    modules: list[tuple[torch.fx.GraphModule, list[torch.Tensor]]] = []

    def look(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        modules.append((module, inputs))
        return module

    def key_for(backend: str) -> str:
        with preferring(backend, query.device):
            compiled(query)
            return compiled_fx_graph_hash(*modules[0], {}, [])[0]

    query = torch.randn(1, 1, 8, 8)
    compiled = torch.compile(attend, backend=look, dynamic=False)
    keys = [key_for(backend) for backend in ("math", "flash", "math")]
    assert len(modules) == 3, "traced anew for each"
    assert keys[0] != keys[1], "and kept apart on the disk"
    assert keys[0] == keys[2], "but found again"
    assert torch.compiler.config.cache_key_tag == ""


@pytest.mark.parametrize(
    ("mode", "tunes", "has_graphs"),
    [(True, False, False), ("max-autotune", True, False), ("reduce-overhead", False, True)],
)
def test_a_mode_turns_on_what_it_says_and_cuda_graphs_go_with_one_alone(
    mode: bool | str, tunes: bool, has_graphs: bool
) -> None:
    options = compile_options(mode)
    assert options["dynamic"] is False
    settings = torch._inductor.list_mode_options(options["mode"]) if "mode" in options else {}
    assert settings.get("max_autotune", False) is tunes
    assert settings.get("triton.cudagraphs", False) is has_graphs
