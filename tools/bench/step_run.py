"""One variant of `bench step`, in ranks of its own: what `tools.bench.step` starts."""

from __future__ import annotations

import os
from typing import Any

import torch

from tools.bench.step_ours import EngineStepper, TorchStepper, drive
from tools.bench.step_work import (
    StepMeasurement,
    Stepper,
    StepVariant,
    StepWork,
    make_config,
    make_work_samples,
    training_batches,
)


def run_variant(work: dict[str, Any], variant: dict[str, Any]) -> StepMeasurement:
    """Run one variant in this process, which is one rank of it; what rank 0 returns is its result."""
    given, chosen = StepWork(**work), StepVariant(**variant)
    torch.set_num_threads(given.threads)
    if chosen.loop == "trainer":
        from tools.bench.step_trainer import run_trainer

        return run_trainer(given, chosen)
    config = make_config(given, chosen)
    objective = make_work_samples(given, config)
    # Before the model, which may take the host's memory with it.
    batches = training_batches(given, chosen, objective)
    if chosen.loop == "ours":
        stepper: Stepper = EngineStepper(given, config)
    else:
        stepper = TorchStepper(given, chosen, config)
    return drive(given, chosen, stepper, batches[rank() :: given.ranks], objective)


def rank() -> int:
    return int(os.environ["RANK"])
