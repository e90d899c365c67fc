"""StableAdamW and Muon under ZeRO: any stage on any number of ranks updates as one process with whole weights does."""

from __future__ import annotations

import copy
import itertools
import statistics
from dataclasses import dataclass
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

STEPS, SEQUENCES, SEQ_LEN, WORDS = 3, 6, 16, 90
NAMES = ("stable_adamw", "muon")
STAGES = ("zero0", "zero1", "zero2", "zero3")
OFFLOADED = ("zero2_offload", "zero3_offload")
BF16 = (("zero1", None), ("zero1", "fp32"), ("zero3", None))
RANKS = ((1, 2), (2, 3), (3, 1), (2, 1), (3, 2), (1, 3), (2, 2), (3, 3), (1, 1))
SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}


PAIRS = tuple(
    ((RANKS[number % 9][0], before), (RANKS[number % 9][1], after))
    for number, (before, after) in enumerate(itertools.product(STAGES, STAGES))
)
"""Each pair of stages and each pair of numbers of ranks once: who saves, who resumes."""


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
    from trainer.runtime import distributed

    world = distributed.start()
    for config in configs:
        engine = _engine(config, world)
        for step in range(STEPS):
            if (step, world.size) == (1, 2):  # it leaves all as it was, and no rank waits
                _step(engine, config, step, bound=1e-9)
            _step(engine, config, step)
        _save(engine, folder / _folder_name(config, world.size))
    distributed.stop()
    return 0


def _resume_all(pairs: list[tuple[Path, Config]], folder: Path) -> int:
    """Runs on each rank: each checkpoint under its new config, from which a further step is made."""
    from trainer.checkpoint.restore import restore
    from trainer.runtime import distributed

    world = distributed.start()
    for checkpoint, config in pairs:
        engine = _engine(config, world)
        restore(engine, checkpoint, world)
        _step(engine, config, STEPS)
        _save(engine, folder / f"{checkpoint.name} to {_folder_name(config, world.size)}")
    distributed.stop()
    return 0


def _engine(config: Config, world: Any) -> Any:
    from trainer.engine.deepspeed_config import compose, load_preset
    from trainer.engine.engine import TrainingEngine
    from trainer.schedule.batch_plan import BatchPlan

    plan = BatchPlan(SEQUENCES, SEQUENCES // world.size, world.size, 1, SEQ_LEN, total_steps=STEPS)
    preset = compose(config, load_preset(config.deepspeed), plan)
    return TrainingEngine(build(config), preset, config.optimizer, world)


def _step(engine: Any, config: Config, number: int, bound: float | None = None) -> None:
    rank, ranks = engine.world.rank, engine.world.size
    engine.begin_step(SEQUENCES // ranks, 1)
    engine.backward(loss_of(engine.network.call, ids_of(number)[rank::ranks].contiguous()))
    assert engine.step(config.optimizer.lr, bound) == (bound is None)


def _save(engine: Any, target: Path) -> None:
    target.mkdir(exist_ok=True)
    engine.capture(target, detached=False).write()
    engine.close()


@dataclass(frozen=True)
class Expected:
    """What one process has after STEPS steps, and after one more."""

    before: ReferenceOptimizer
    after: ReferenceOptimizer


@pytest.fixture(scope="module", params=NAMES)
def expected(request: pytest.FixtureRequest) -> Expected:
    from trainer.model.hidden_matrices import hidden_matrices

    config = make_config(request.param, "zero0")
    built = build(config)
    weights = dict(built.module.named_parameters())
    matrices = hidden_matrices(built.module, built.exports)
    assert len(matrices) == 12
    found, states = ReferenceOptimizer(config.optimizer, weights, matrices), []
    for step in range(STEPS + 1):
        built.module.zero_grad()
        loss_of(built.module, ids_of(step)).backward()
        found.step({name: each.grad for name, each in weights.items() if each.grad is not None})
        with torch.no_grad():
            for name, each in weights.items():
                each.copy_(found.weights[name])
        states.append(copy.deepcopy(found))
    return Expected(*states[-2:])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the checkpoints of all _configs."""
    folder = tmp_path_factory.mktemp("trained")
    for ranks in (1, 2, 3):
        assert run_ranks(_train_all, ranks, _configs(ranks), folder) == [0] * ranks
    return folder


def _configs(ranks: int) -> list[Config]:
    found = [make_config(name, preset) for name in NAMES for preset in STAGES]
    if ranks == 2:
        found += [make_config(name, preset, "bf16", dtype) for name in NAMES for preset, dtype in BF16]
    if ranks == 3:
        found += [make_config(name, preset) for name in NAMES for preset in OFFLOADED]
    return found


def _folder_name(config: Config, ranks: int) -> str:
    train = config.train
    accumulated = train.gradient_accumulation_dtype
    return f"{config.optimizer.name}-{config.deepspeed}-{train.precision}-{accumulated}-{ranks}"


def _errors(reference: ReferenceOptimizer, checkpoint: Path) -> dict[str, float]:
    """Differences of weights, over what they have moved, and of moments, over what they are."""
    start = dict(build(make_config(reference.settings.name, "zero0")).module.named_parameters())
    files, errors = ZeroFiles(checkpoint), dict[str, float]()
    assert files.adam_step == reference.steps
    for name, weight in reference.weights.items():
        if name.endswith("key.bias"):  # its gradient is nought but for rounding, which an adaptive step makes large
            continue
        moved = (weight - start[name].detach()).norm()
        errors[name] = float((files.read_weight(name).double() - weight).norm() / moved)
        for kind, moment in reference.moments[name].items():
            found = torch.empty(moment.numel())
            files.read_into(name, 0, found, kind)
            errors[f"{name} {kind}"] = float((found.view_as(moment) - moment).norm() / moment.norm())
    return errors


def test_weights_and_moments_are_those_of_one_process(expected: Expected, trained: Path) -> None:
    """The iteration of Muon makes the rounding of a gradient some ten times larger: the bound is 1e-5 a step."""
    reference, found = expected.before, {}
    for ranks in (1, 2, 3):
        for config in _configs(ranks):
            if config.optimizer.name == reference.settings.name and config.train.precision == "fp32":
                name = _folder_name(config, ranks)
                found[name] = max(_errors(reference, trained / name).values())
    assert len(found) == 14
    assert max(found.values()) < STEPS * 1e-5, found
    if reference.settings.name == "stable_adamw":
        assert reference.smallest_rate < 0.9 * reference.settings.lr, "otherwise it was AdamW all the time"


def test_half_precision_updates_fp32_masters_alike(expected: Expected, trained: Path) -> None:
    """Gradients are those of bf16, whose noise is between the two; the masters are not rounded."""
    reference = expected.before
    for preset, dtype in BF16:
        config = make_config(reference.settings.name, preset, "bf16", dtype)
        errors = _errors(reference, trained / _folder_name(config, 2))
        assert statistics.median(errors.values()) < 0.1, (preset, dtype)
        files = ZeroFiles(trained / _folder_name(config, 2))
        for name in reference.matrices:
            weight = files.read_weight(name)
            assert not torch.equal(weight, weight.bfloat16().float())


def test_a_matrix_of_muon_has_one_moment_in_a_checkpoint(trained: Path) -> None:
    for preset in STAGES:
        folder = trained / _folder_name(make_config("muon", preset), 2)
        sizes = sum(path.stat().st_size for path in folder.iterdir())
        other = trained / _folder_name(make_config("stable_adamw", preset), 2)
        matrices = 2 * (4 * 24 * 24 + 2 * 24 * 40)
        saved = sum(path.stat().st_size for path in other.iterdir()) - sizes
        assert saved == pytest.approx(4 * matrices, rel=0.1), "but for what names a further group"


def test_any_stage_and_number_of_ranks_goes_on_under_any_other(
    expected: Expected, trained: Path, tmp_path: Path
) -> None:
    name, found = expected.after.settings.name, {}
    for ranks in (1, 2, 3):
        pairs = [
            (trained / _folder_name(make_config(name, before), saved), make_config(name, after))
            for (saved, before), (resumed, after) in PAIRS
            if resumed == ranks
        ]
        assert run_ranks(_resume_all, ranks, pairs, tmp_path) == [0] * ranks
    for folder in tmp_path.iterdir():
        found[folder.name] = max(_errors(expected.after, folder).values())
    assert len(found) == len(PAIRS)
    assert max(found.values()) < (STEPS + 1) * 1e-5, found
