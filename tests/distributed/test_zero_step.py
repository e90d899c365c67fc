"""Steps with DeepSpeed's passes over the gradients left out give what DeepSpeed's own steps give."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ranks import run_ranks
from tests.tiny_bench import write_tiny_model
from tools.bench.step import VARIANTS
from tools.bench.step_ours import EngineStepper
from tools.bench.step_work import StepWork, make_config, make_work_samples, training_batches

STEPS = 4


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_shortened_step_is_deepspeeds_step(stage: int, ranks: int, tmp_path: Path) -> None:
    model, norms = write_tiny_model(tmp_path), dict[str, Any]()
    for name in ("shortened", "deepspeeds"):
        path = tmp_path / f"{name}.json"
        assert run_ranks(_train, ranks, model, stage, name == "shortened", str(path)) == [0] * ranks
        norms[name] = json.loads(path.read_text())
    assert len(norms["shortened"]) == STEPS and norms["shortened"][0]["grad_norm"] > 0.1, "clipping has work to do"
    copies = {name: [step.pop("copied") for step in steps] for name, steps in norms.items()}
    assert 100 * max(copies["shortened"]) < min(copies["deepspeeds"]), "gradients are not copied to fp64"
    for ours, theirs in zip(norms["shortened"], norms["deepspeeds"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


class Fp64Copies(TorchDispatchMode):
    """The elements of the largest tensor that is cast to fp64."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and result.dtype == torch.float64:
            self.largest = max(self.largest, result.numel())
        return result


def _train(model: str, stage: int, shortened: bool, path: str) -> int:
    """STEPS steps clipped to a tenth of what the norm is; rank 0 writes what each step ended with."""
    import trainer.engine.engine

    if not shortened:
        assert trainer.engine.engine.patch_zero_optimizer is not None
        trainer.engine.engine.patch_zero_optimizer = lambda *_: None  # in this process, which ends with the test
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    work = StepWork(model=model, micro_size=2, seq_len=32, ranks=ranks, steps=STEPS, warmup_steps=0, dropout=0.0)
    variant = VARIANTS["ours"]
    config = make_config(work, variant)
    clipped = config.optimizer.model_copy(update={"clip": 0.05})
    config = config.model_copy(update={"deepspeed": f"zero{stage}", "optimizer": clipped})
    objective = make_work_samples(work, config)
    stepper = EngineStepper(work, config)
    steps = []
    for batch in training_batches(work, variant, objective)[rank : STEPS * ranks : ranks]:
        loss = stepper.forward(batch)
        stepper.backward(loss)
        with Fp64Copies() as copies:
            stepper.optimize()
        weights = sum(float(parameter.detach().double().abs().sum()) for parameter in stepper.model.parameters())
        found = {"loss": float(loss.detach()), "grad_norm": stepper.engine.grad_norm, "weights": weights}
        steps.append({**found, "copied": copies.largest})
    if rank == 0:
        Path(path).write_text(json.dumps(steps))
    return 0
