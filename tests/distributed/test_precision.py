"""bf16, fp16 and their options."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.console import make_console
from tests.ranks import TINY_ROBERTA, allow_fp16, losses, metrics, run_ranks, tiny_config, train
from tools.convert import convert
from trainer.config import Config
from trainer.errors import EXIT_FINISHED, EXIT_USER_MISTAKE, UserError
from trainer.inputs.inputs import open_inputs

TOLERANCE = 0.01  # nats; measured over 60 steps of this model: 0.0018 to 0.0025
STEPS = 10


@pytest.fixture(scope="module")
def fp32(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    run_dir = tmp_path_factory.mktemp("fp32")
    assert train(tiny_config(workspace, run_dir, train={"steps": STEPS}), 2) == EXIT_FINISHED
    return losses(run_dir)


def with_fp16_allowed(config: Config, first: int = 0, last: int = 0) -> int:
    """Runs on each rank."""
    from trainer.train import run

    allow_fp16()
    return poison(config, first, last) if last else run(config)


@pytest.mark.parametrize("preset", ["zero1", "zero2", "zero3"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_follows_fp32_and_converts(
    precision: str, preset: str, fp32: list[float], workspace: Path, tmp_path: Path
) -> None:
    settings = {"precision": precision, "steps": STEPS}
    config = tiny_config(workspace, tmp_path / "run", train=settings, deepspeed=preset)
    assert run_ranks(with_fp16_allowed, 2, config) == [EXIT_FINISHED] * 2
    scales = {line["train/loss_scale"] for line in metrics(tmp_path / "run")}
    assert scales == ({2.0**16} if precision == "fp16" else {1.0})
    found = losses(tmp_path / "run")
    assert found == pytest.approx(fp32, abs=TOLERANCE)
    conversion = convert(str(tmp_path / "run"), str(tmp_path / "model"), "float32", "5GB", make_console())
    assert conversion.difference_from_training < 0.05


@pytest.mark.parametrize("preset", ["zero1", "zero2", "zero3"])
def test_bf16_with_fp32_gradient_accumulation(preset: str, fp32: list[float], workspace: Path, tmp_path: Path) -> None:
    settings = {"precision": "bf16", "gradient_accumulation_dtype": "fp32", "steps": STEPS}
    config = tiny_config(workspace, tmp_path / "run", train=settings, deepspeed=preset, checkpoint={"every_steps": 5})
    assert train(config, 2) == EXIT_FINISHED
    assert losses(tmp_path / "run") == pytest.approx(fp32, abs=TOLERANCE)
    convert(str(tmp_path / "run"), str(tmp_path / "model"), "float32", "5GB", make_console())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_at_stage_0_is_refused_with_the_remedy(precision: str, workspace: Path, tmp_path: Path) -> None:
    config = tiny_config(workspace, tmp_path, train={"precision": precision}, deepspeed="zero0")
    with pytest.raises(UserError, match="zero1"):
        open_inputs(config, 1)


def poison(config: Config, first: int, last: int) -> int:
    """Runs on each rank: one gradient on rank 0 is infinite in steps `first` to `last`."""
    import torch

    from trainer.loop import Loop
    from trainer.train import run

    original = Loop._train_step

    def poisoned(self: Loop, *arguments: object) -> object:
        handle = None
        if first <= self.state.step + 1 <= last and self.world.is_main:
            layer = self.engine.module.lm_head.dense
            handle = layer.register_full_backward_hook(
                lambda _module, inputs, _outputs: tuple(torch.full_like(value, torch.inf) for value in inputs)
            )
        result = original(self, *arguments)  # type: ignore[arg-type]
        if handle is not None:
            handle.remove()
        return result

    Loop._train_step = poisoned  # type: ignore[method-assign,assignment]
    return run(config)


def test_the_loss_scale_of_fp16_survives_another_layout(workspace: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"train": {"precision": "fp16", "steps": 20}, "checkpoint": {"every_steps": 10}}
    first = tiny_config(workspace, tmp_path, deepspeed="zero1", **settings)
    assert run_ranks(with_fp16_allowed, 2, first, 5, 6) == [EXIT_FINISHED] * 2
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000020")
    uninterrupted = losses(tmp_path)
    assert run_ranks(with_fp16_allowed, 1, tiny_config(workspace, tmp_path, deepspeed="zero3", **settings)) == [0]
    scales = [line["train/loss_scale"] for line in metrics(tmp_path) if "train/loss_scale" in line]
    assert scales == [2.0**16] * 5 + [2.0**15] * 15
    assert losses(tmp_path) == pytest.approx(uninterrupted, abs=TOLERANCE)


def with_squares_of_gradients(config: Config, path: str) -> int:
    """Write the sum of squares of the gradients that each call of AdamW divides by its scale and takes.

    The loss scale doubles after every second step.
    """
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    from trainer.engine.engine import TrainingEngine

    squares, begin = [], TrainingEngine.__init__

    def begin_with_short_window(engine: TrainingEngine, *arguments: Any) -> None:
        begin(engine, *arguments)
        scaler = engine._engine.optimizer.loss_scaler
        scaler.scale_window, scaler.cur_scale = 2, 2.0**10

    TrainingEngine.__init__ = begin_with_short_window  # type: ignore[method-assign]

    def note(adamw: Any, *_: Any) -> None:
        parameters = [parameter for group in adamw.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        scale = float(getattr(adamw, "grad_scale", 1.0))
        squares.append(sum(float(gradient.double().square().sum()) for gradient in gradients) / scale**2)

    register_optimizer_step_pre_hook(note)
    code = with_fp16_allowed(config)
    Path(path).write_text(json.dumps(squares))
    return code


@pytest.mark.parametrize("preset", ["zero1", "zero2_offload", "zero3"])
def test_gradients_are_divided_by_the_scale_that_they_were_multiplied_with(
    preset: str, workspace: Path, tmp_path: Path
) -> None:
    """Gpu A10: on a step where the scale doubles as well."""
    config = tiny_config(
        workspace,
        tmp_path / "run",
        deepspeed=preset,
        optimizer={"clip": 1e9},
        train={"precision": "fp16", "steps": 6},
        logging={"every_steps": 1},
    )
    assert run_ranks(with_squares_of_gradients, 1, config, str(tmp_path / "squares")) == [EXIT_FINISHED]
    lines = [line for line in metrics(tmp_path / "run") if "train/grad_norm" in line]
    assert len({line["train/loss_scale"] for line in lines}) >= 3, "it doubles every second step"
    squares = json.loads((tmp_path / "squares").read_text())
    calls = len(squares) // len(lines)
    found = [sum(squares[begin : begin + calls]) ** 0.5 for begin in range(0, len(squares), calls)]
    assert found == pytest.approx([line["train/grad_norm"] for line in lines], rel=1e-3)


def compare_buffers(config: Config) -> int:
    """Runs on each rank: 0 when the engine has left each buffer as the model has it."""
    from trainer.engine.deepspeed_config import compose, load_preset
    from trainer.engine.engine import TrainingEngine
    from trainer.model.build import build_model
    from trainer.runtime import distributed

    world = distributed.start()
    inputs = open_inputs(config, world.size)
    built = build_model(config.model, inputs.vocabulary, config.data.seq_len, config.run.seed)
    before = {name: buffer.clone() for name, buffer in built.model.named_buffers() if buffer.is_floating_point()}
    assert before, "rotary frequencies"
    ds_config = compose(config, load_preset(config.deepspeed), inputs.plan)
    module = TrainingEngine(built, ds_config, config.optimizer, world).module
    assert all(parameter.dtype == torch.bfloat16 for parameter in module.parameters())
    after = dict(module.named_buffers())
    same = [after[name].dtype == torch.float32 and torch.equal(after[name], value) for name, value in before.items()]
    return EXIT_FINISHED if all(same) else EXIT_USER_MISTAKE


@pytest.mark.parametrize("preset", ["zero1", "zero3"])
def test_the_engine_leaves_rotary_frequencies_in_fp32(preset: str, workspace: Path, tmp_path: Path) -> None:
    """Gpu A14: rounded to bf16 they would move an angle at position 500 by half a radian."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    overrides = {name: TINY_ROBERTA[name] for name in names}
    model = {"preset": "modernbert-base", "overrides": overrides}
    config = tiny_config(workspace, tmp_path, model=model, deepspeed=preset, train={"steps": 1, "precision": "bf16"})
    assert run_ranks(compare_buffers, 1, config) == [EXIT_FINISHED]
