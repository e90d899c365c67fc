"""What `plan` says a step sends, against the collectives that real ranks call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed.plan_engines import EngineLayout, steps_of
from tests.ranks import run_ranks
from tools.plan.wire import matrix_traffic, plan_traffic
from trainer.engine.state_size import WEIGHT_BYTES
from trainer.sizing.zero_memory import ZeroSettings

RANKS = 2
MODEL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "max_position_embeddings": 130,
}
LAYOUTS = [
    EngineLayout(0, "fp32", accumulation=2),
    EngineLayout(1, "bf16", accumulation=2),
    EngineLayout(1, "bf16", accumulation=2, gradient_accumulation_dtype="fp32"),
    EngineLayout(2, "fp32", accumulation=3),
    EngineLayout(2, "bf16", accumulation=1, changes={"reduce_bucket_size": 100_000}),
    EngineLayout(3, "fp32", accumulation=1),
    EngineLayout(3, "bf16", accumulation=2),
    EngineLayout(1, "fp32", accumulation=2, frozen=("roberta.encoder.*",)),
    EngineLayout(3, "fp32", accumulation=2, frozen=("roberta.encoder.*",)),
    EngineLayout(0, "fp32", accumulation=1, optimizer="muon"),
    EngineLayout(1, "bf16", accumulation=1, optimizer="muon"),  # the cut is between the layers
    EngineLayout(1, "bf16", accumulation=1, frozen=("*.layer.0.*.query.weight",), optimizer="muon"),
    EngineLayout(3, "bf16", accumulation=1, optimizer="muon"),
]
# How a ring moves a collective: which of its two tensors counts, and how often.
_ALL_REDUCE, _ONCE = 2, 1
_FACTORS = {"allreduce_": _ALL_REDUCE, "_allgather_base_": _ONCE, "_reduce_scatter_base_": _ONCE}


class CountedCollectives(TorchDispatchMode):
    """Bytes that a ring moves for all collectives called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            if name == "alltoall_base_":  # sent and received, which with two ranks is what both send
                self.bytes += sum(map(_size, args))
            else:
                self.bytes += _FACTORS[name] * max(map(_size, args))  # of input and output the whole one
        return func(*args, **(kwargs or {}))


def _size(argument: Any) -> int:
    if isinstance(argument, torch.Tensor):
        return argument.nbytes
    return sum(map(_size, argument)) if isinstance(argument, list | tuple) else 0


def _count(result: Path) -> int:
    from trainer.runtime import distributed

    world = distributed.start()
    counts = []
    for layout in LAYOUTS:
        with steps_of(layout, world, **MODEL) as step:
            step()
            step()  # stage 3 fetches ahead only from here on
            with CountedCollectives() as counted:
                step()
        counts.append(counted.bytes)
    if world.is_main:
        result.write_text(json.dumps(counts))
    distributed.stop()
    return 0


def test_the_wire_bytes_are_those_of_the_collectives(tmp_path: Path) -> None:
    assert run_ranks(_count, RANKS, tmp_path / "counts.json") == [0, 0]
    for layout, counted in zip(LAYOUTS, json.loads((tmp_path / "counts.json").read_text()), strict=True):
        model, zero = layout.estimate(**MODEL), ZeroSettings.of(layout.preset())
        travelling = matrix_traffic(model.matrix_shapes, layout.stage, RANKS, layout.precision, on_cpu=True)
        wire = plan_traffic(
            zero, model.parameter_sizes, layout.accumulation, layout.precision, model.frozen_sizes, travelling
        )
        # Beside them go a norm, an overflow flag and some padding.
        assert wire.elements * WEIGHT_BYTES[layout.precision] == pytest.approx(counted, rel=1e-3), layout
        assert wire.sent_bytes(RANKS) == pytest.approx(counted / 2, rel=1e-3)


def test_a_model_beyond_the_reuse_distance_gathers_its_first_weights_twice() -> None:
    zero = ZeroSettings.of({"zero_optimization": {"stage": 3}})
    wire = plan_traffic(zero, [10**9, 10**9], accumulation=4, precision="bf16")
    assert wire.gradients == 4 * 2 * 10**9
    assert wire.weights == 4 * (2 * 10**9 + 15 * 10**8) and not wire.is_exact
