"""StableAdamW and Muon under ZeRO: any stage on any number of ranks updates as one process with whole weights does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.optimizer_reference import ReferenceOptimizer
from tests.ranks import run_ranks
from trainer.checkpoint.zero_files import ZeroFiles
from trainer.config import Config
from trainer.config.file import parse_config
from trainer.data.tokenizer import Vocabulary
from trainer.engine.partitions import MOMENTS, WEIGHT

STEPS, SEQUENCES, SEQ_LEN, WORDS = 4, 6, 16, 90
NAMES = ("stable_adamw", "muon")
FP32 = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}


def make_config(name: str, preset: str, precision: str = "fp32", accumulation: str | None = None) -> Config:
    return parse_config(
        {
            "run": {"dir": "unused"},
            "model": {
                "preset": "bert-base",
                "tokenizer": "unused",
                "overrides": {**SIZES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
            },
            "data": {"train": "unused", "seq_len": SEQ_LEN},
            "batch": {"global_size": SEQUENCES},
            # Gradients above the bound, so that clipping has work to do; steps that change them from step to step.
            "optimizer": {"name": name, "lr": 0.02, "clip": 0.5, "betas": [0.8, 0.9], "weight_decay": 0.1},
            "train": {"steps": STEPS, "precision": precision, "gradient_accumulation_dtype": accumulation},
            "deepspeed": preset,
        },
        "test",
    )


def build(config: Config) -> Any:
    from trainer.model.trained import build_trained

    return build_trained(config, Vocabulary(WORDS, 0, 2, 2, 4, 1, (0, 1, 2, 3, 4), ""), "masked")


def ids_of(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(5, WORDS - 60 if step else WORDS, (SEQUENCES, SEQ_LEN), generator=generator)


def loss_of(network: Any, rows: torch.Tensor) -> torch.Tensor:
    return network(input_ids=rows, labels=rows)["loss"]


def _train_all(configs: list[Config], folder: Path) -> int:
    """Runs on each rank: STEPS steps of each config, and a checkpoint."""
    from trainer.engine.deepspeed_config import compose, load_preset
    from trainer.engine.engine import TrainingEngine
    from trainer.runtime import distributed
    from trainer.schedule.batch_plan import BatchPlan

    world = distributed.start()
    micro = SEQUENCES // world.size
    for config in configs:
        plan = BatchPlan(SEQUENCES, micro, world.size, 1, SEQ_LEN, total_steps=STEPS)
        engine = TrainingEngine(
            build(config), compose(config, load_preset(config.deepspeed), plan), config.optimizer, world
        )
        for step in range(STEPS):
            engine.begin_step(micro, 1)
            engine.backward(loss_of(engine.network.call, ids_of(step)[world.rank :: world.size].contiguous()))
            assert engine.step(config.optimizer.lr)
        target = folder / f"{config.optimizer.name}-{config.deepspeed}-{config.train.precision}"
        target.mkdir(exist_ok=True)
        engine.capture(target, detached=False).write()
        engine.close()
    distributed.stop()
    return 0


@pytest.fixture(scope="module", params=NAMES)
def reference(request: pytest.FixtureRequest) -> ReferenceOptimizer:
    from trainer.model.hidden_matrices import hidden_matrices

    config = make_config(request.param, "zero0")
    built = build(config)
    weights = dict(built.module.named_parameters())
    matrices = hidden_matrices(built.module, built.exports)
    assert len(matrices) == 12
    found = ReferenceOptimizer(config.optimizer, weights, matrices)
    for step in range(STEPS):
        built.module.zero_grad()
        loss_of(built.module, ids_of(step)).backward()
        found.step({name: each.grad for name, each in weights.items() if each.grad is not None})
        with torch.no_grad():
            for name, each in weights.items():
                each.copy_(found.weights[name])
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The folder of the checkpoints, by ranks."""
    folders = {}
    for ranks in (1, 2, 3):
        folders[ranks] = tmp_path_factory.mktemp(f"{ranks}-ranks")
        configs = [make_config(name, preset) for name in NAMES for preset in FP32]
        assert run_ranks(_train_all, ranks, configs, folders[ranks]) == [0] * ranks
    return folders


def test_weights_and_moments_are_those_of_one_process(
    reference: ReferenceOptimizer, trained: dict[int, Path]
) -> None:
    start = dict(build(make_config(reference.settings.name, "zero0")).module.named_parameters())
    errors: dict[str, float] = {}
    for ranks, folder in trained.items():
        for preset in FP32:
            files = ZeroFiles(folder / f"{reference.settings.name}-{preset}-fp32")
            assert files.adam_step == STEPS
            for name, weight in reference.weights.items():
                moved = float((weight - start[name].detach()).norm())
                error = float((files.read_weight(name).double() - weight).norm()) / moved
                for kind, moment in reference.moments[name].items():
                    found = torch.empty(moment.numel())
                    files.read_into(name, 0, found, kind)
                    error = max(error, float((found.view_as(moment) - moment).norm() / moment.norm()))
                key = f"{ranks} × {preset}"
                errors[key] = max(errors.get(key, 0.0), error)
    print(json.dumps(errors, indent=1))
    assert len(errors) == 18
    assert max(errors.values()) < 1e-5, errors
