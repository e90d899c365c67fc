"""Losses and gradients that are not finite, or jump. Steps are skipped, runs end with 4 or roll back."""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import os
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import trainer.loop
from tests.ranks import ADDING, allow_fp16, losses, metrics, run_ranks, started_ranks, tiny_config, train
from trainer.checkpoint.find import candidates
from trainer.config import Config
from trainer.engine.engine import TrainingEngine
from trainer.errors import EXIT_DIVERGED, EXIT_FINISHED, EXIT_STOPPED_AFTER_SAVING
from trainer.loop import Loop
from trainer.schedule.learning_rate import learning_rate

BATCH = 8
LAYOUTS = [
    *(({"precision": "fp32"}, f"zero{stage}") for stage in range(4)),
    ({"precision": "bf16"}, "zero1"),
    ({"precision": "bf16"}, "zero3"),
    ({"precision": "bf16", "gradient_accumulation_dtype": "fp32"}, "zero1"),
    ({"precision": "fp16"}, "zero1"),
    ({"precision": "fp32"}, "zero2_offload"),
    ({"precision": "fp32"}, "zero3_offload"),
    ({"precision": "bf16", "gradient_accumulation_dtype": "fp32"}, "zero2_offload"),
]
at_every_stage = pytest.mark.parametrize(("train_section", "preset"), LAYOUTS)


def fingerprint(engine: TrainingEngine) -> str:
    """Of all that an update could change on this rank: weights (ZeRO 3: its part of them), masters, AdamW's state."""
    tensors = [getattr(parameter, "ds_tensor", parameter) for parameter in engine.module.parameters()]
    for fragment in engine.partitions.fragments():
        tensors.extend(fragment.tensors.values())
    tensors.extend(engine.partitions.steps())
    content = hashlib.sha256()
    for tensor in tensors:
        content.update(tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    return content.hexdigest()


def nan_loss(loop: Loop, value: torch.Tensor) -> torch.Tensor:
    return value * math.nan


def infinite_loss(loop: Loop, value: torch.Tensor) -> torch.Tensor:
    return value + math.inf  # its gradients are finite


def infinite_gradient(loop: Loop, value: torch.Tensor) -> torch.Tensor:
    value.register_hook(lambda gradient: gradient * math.inf)
    return value


def large_gradient(loop: Loop, value: torch.Tensor) -> torch.Tensor:
    value.register_hook(lambda gradient: gradient * 10)  # more would overflow in fp16, whose loss scale is 65,536
    return value


def high_loss(loop: Loop, value: torch.Tensor) -> torch.Tensor:
    return value + 6 * value.detach()


Damage = Callable[[Loop, torch.Tensor], torch.Tensor]


def damaged(config: Config, damage: Damage, first: int, last: int, signal_at: int = 0, kill_at: int = 0) -> int:
    """Runs on each rank: `damage` the losses of rank 1, where the data of steps `first` to `last` are.

    By data, not by steps: a run that passes over them is well again. The engine must be the same before and after a
    step that was skipped, and no loader of before a rollback may be left.

    Args:
        signal_at: rank 0 is sent TERM in this step.
        kill_at: the whole run is lost after this step, when it has rolled back.
    """
    from trainer.train import run

    allow_fp16()
    original = Loop._train_step

    def step(self: Loop, micro_batches: list[Any], *arguments: Any) -> object:
        place = self.state.samples // BATCH + 1
        loss_sums = trainer.loop.loss_sums

        def with_damage(*inputs: Any) -> torch.Tensor:
            value = loss_sums(*inputs)
            return damage(self, value) if first <= place <= last and self.world.rank == 1 else value

        if self.state.step + 1 == signal_at and self.world.is_main:
            os.kill(os.getpid(), signal.SIGTERM)
        trainer.loop.loss_sums = with_damage
        before = fingerprint(self.engine)
        try:
            result = original(self, micro_batches, *arguments)
        finally:
            assert (fingerprint(self.engine) == before) == (self.state.skipped_in_a_row > 0)
            trainer.loop.loss_sums = loss_sums
            assert len(multiprocessing.active_children()) <= config.data.workers
        if self.state.rollbacks and self.state.step == kill_at:
            os._exit(1)
        return result

    Loop._train_step = step  # type: ignore[method-assign,assignment]
    return run(config)


def saved_steps(run_dir: Path) -> list[int]:
    return [candidate.step for candidate in candidates(run_dir)]


def events(run_dir: Path) -> list[dict[str, Any]]:
    return [line for line in metrics(run_dir) if "event" in line]


def one_after_another(loop: Loop, value: torch.Tensor) -> torch.Tensor:
    kinds = {5: nan_loss, 6: infinite_loss, 8: infinite_gradient, 10: large_gradient}
    return kinds.get(loop.state.step + 1, lambda _loop, same: same)(loop, value)


@at_every_stage
def test_what_is_not_finite_or_jumps_on_one_rank_is_skipped_by_all_bit_for_bit_and_counted(
    train_section: dict[str, Any], preset: str, workspace: Path, tmp_path: Path
) -> None:
    """A NaN loss, an infinite loss of finite gradients, an infinite gradient, a finite one that is too large."""
    bound = {"max_grad_norm_ratio": 3, "window": 3}
    sections: dict[str, Any] = {
        "train": {"steps": 12, **train_section},
        "deepspeed": preset,
        "resilience": bound,
        **ADDING,
    }
    assert run_ranks(damaged, 2, tiny_config(workspace, tmp_path, **sections), one_after_another, 1, 12) == [0, 0]
    lines = [line for line in metrics(tmp_path) if "train/loss" in line]
    assert [line["train/skipped_steps"] for line in lines] == [0, 0, 0, 0, 1, 2, 2, 3, 3, 4, 4, 4]
    assert [line["step"] for line in lines if line["train/grad_norm"] is None] == [5, 6, 8]
    assert lines[9]["train/grad_norm"] > 3 * lines[8]["train/grad_norm"]
    assert [line["step"] for line in lines if line["train/loss"] is None] == [5, 6]
    found = [(line["step"], line["event/first_sample"], line["event/end_sample"]) for line in events(tmp_path)]
    assert found == [(5, 32, 40), (6, 40, 48), (8, 56, 64), (10, 72, 80)]
    assert {line["event"] for line in events(tmp_path)} == {"skip"}
    log = (tmp_path / "logs" / "rank-00001.log").read_text()
    assert "skip at step 5: a loss or a gradient is not finite (samples t = 32 to 39)" in log
    assert "skip at step 10: the gradient norm is " in log


def test_bounds_that_nothing_exceeds_change_no_loss(workspace: Path, tmp_path: Path) -> None:
    assert train(tiny_config(workspace, tmp_path / "plain"), 2) == EXIT_FINISHED
    bounds = {"max_grad_norm_ratio": 100, "max_loss_ratio": 100, "window": 3}
    assert train(tiny_config(workspace, tmp_path / "watched", resilience=bounds), 2) == EXIT_FINISHED
    assert losses(tmp_path / "watched") == losses(tmp_path / "plain")


@pytest.mark.parametrize("damage", [nan_loss, infinite_gradient])
def test_too_many_skipped_steps_in_a_row_end_with_4_and_no_new_checkpoint(
    damage: Damage, workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"max_skipped_steps": 3}
    config = tiny_config(workspace, tmp_path, resilience=settings, checkpoint={"every_steps": 5})
    assert run_ranks(damaged, 2, config, damage, 9, 20) == [EXIT_DIVERGED] * 2
    shown = capsys.readouterr().out
    assert "Training diverged: 3 steps in a row were skipped, up to step 11" in shown
    assert "[resilience.max_skipped_steps=3]" in shown and "on_divergence=rollback" in shown
    assert saved_steps(tmp_path) == [5]  # the save due at step 10 was put off
    assert [(line["step"], line["event"]) for line in events(tmp_path)] == [
        *((step, "skip") for step in (9, 10, 11)),
        (11, "diverged"),
    ]
    assert (events(tmp_path)[-1]["event/first_sample"], events(tmp_path)[-1]["event/end_sample"]) == (64, 88)


def test_a_save_that_skipped_steps_put_off_is_made_at_the_next_good_one(workspace: Path, tmp_path: Path) -> None:
    config = tiny_config(workspace, tmp_path, train={"steps": 12}, checkpoint={"every_steps": 5, "keep_last": 9})
    assert run_ranks(damaged, 2, config, nan_loss, 5, 6) == [EXIT_FINISHED] * 2
    assert saved_steps(tmp_path) == [12, 10, 7]


def with_broken_weights(config: Config, at_step: int) -> int:
    """Runs on each rank: the update of one step writes NaN into the weights, from finite gradients."""
    from trainer.train import run

    allow_fp16()
    original = TrainingEngine.step
    steps = 0

    def step(self: TrainingEngine, rate: float, *arguments: Any) -> bool:
        nonlocal steps
        steps += self._engine.is_gradient_accumulation_boundary()
        return original(self, math.nan if steps == at_step else rate, *arguments)

    TrainingEngine.step = step  # type: ignore[method-assign,assignment]
    return run(config)


@pytest.mark.parametrize(
    ("train_section", "preset"), [*(({"precision": "fp32"}, f"zero{stage}") for stage in (0, 1, 3))]
)
def test_weights_that_are_not_finite_are_never_saved(
    train_section: dict[str, Any],
    preset: str,
    workspace: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sections: dict[str, Any] = {"train": {"steps": 10, **train_section}, "checkpoint": {"every_steps": 3}}
    config = tiny_config(workspace, tmp_path, deepspeed=preset, **sections)
    assert run_ranks(with_broken_weights, 2, config, 6) == [EXIT_DIVERGED] * 2
    assert "weights or optimizer state are not finite at step 6" in capsys.readouterr().out
    assert saved_steps(tmp_path) == [3]
    # The same after a resume, when what is looked at was restored.
    assert run_ranks(with_broken_weights, 2, config, 3) == [EXIT_DIVERGED] * 2
    assert "weights or optimizer state are not finite at step 6" in capsys.readouterr().out
    assert saved_steps(tmp_path) == [3]


def judge_padding(config: Config) -> int:
    """Runs on each rank: the verdict on its state with infinities in the padding, and with one in a weight."""
    from trainer.inputs.inputs import open_inputs
    from trainer.model.build import build_model
    from trainer.runtime import distributed

    world = distributed.start()
    inputs = open_inputs(config, world.size)
    built = build_model(config.model, inputs.vocabulary, config.data.seq_len, config.run.seed)
    engine = TrainingEngine(built, inputs.ds_config, config.optimizer, world)
    views = [tensor for fragment in engine.partitions.fragments() for tensor in fragment.tensors.values()]
    values = [view.clone() for view in views]
    for view in views:
        torch.empty(0).set_(view.untyped_storage()).fill_(math.inf)
    for view, value in zip(views, values, strict=True):
        view.copy_(value)
    flats = {view.untyped_storage().data_ptr(): view.untyped_storage() for view in views}
    padded = sum(flat.nbytes() for flat in flats.values()) > sum(view.nbytes for view in views)
    assert distributed.all_reduce_sum(world, [padded])[0] > 0, "there is padding to look past"
    assert engine.is_finite()
    views[0][0] = math.inf
    assert not engine.is_finite()
    distributed.stop()
    return EXIT_FINISHED


def test_what_pads_the_parts_of_stage_3_is_not_judged(workspace: Path, tmp_path: Path) -> None:
    """Memory that nothing has written: it was infinite now and then, and a good run ended with exit code 4."""
    batch = {"global_size": 12, "micro_size": 2}
    config = tiny_config(workspace, tmp_path, deepspeed="zero3", batch=batch)
    assert run_ranks(judge_padding, 3, config) == [EXIT_FINISHED] * 3


DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}


def rolling_back(workspace: Path, run_dir: Path, **sections: Any) -> Config:
    """Bounds on everything, checkpoints at 5, 10 and 15, dropout."""
    base = tiny_config(workspace, run_dir)
    merged = {
        "model": {"overrides": {**base.model.overrides, **DROPOUT}},
        "checkpoint": {"every_steps": 5, "keep_last": 9},
        **sections,
        "resilience": {
            "on_divergence": "rollback",
            "max_skipped_steps": 3,
            "max_loss_ratio": 3,
            "max_grad_norm_ratio": 50,
            "window": 3,
            **sections.get("resilience", {}),
        },
    }
    return tiny_config(workspace, run_dir, **merged)


def trained_on(run_dir: Path) -> list[tuple[int, int]]:
    """(step, samples) of the training lines."""
    return [(line["step"], line["samples"]) for line in metrics(run_dir) if "train/loss" in line]


Spiked = Callable[[int], tuple[Config, str]]


@pytest.fixture(scope="module")
def spiked(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Spiked:
    """Number of a layout → a run of 20 steps with a loss spike in the 13th, and what it said; each is made once."""

    @cache
    def run_of(number: int) -> tuple[Config, str]:
        train_section, preset = LAYOUTS[number]
        sections: dict[str, Any] = {"train": {"steps": 20, **train_section}, "deepspeed": preset}
        config = rolling_back(workspace, tmp_path_factory.mktemp(f"layout-{number}") / "run", **sections)
        with started_ranks(damaged, 2, config, high_loss, 13, 13) as ranks:
            assert ranks.wait() == [EXIT_FINISHED] * 2
            return config, ranks.output()

    return run_of


@pytest.mark.parametrize("number", [0, 1, 3, 5, 6, 7])
def test_a_loss_spike_rolls_back_and_passes_over_the_data(number: int, spiked: Spiked) -> None:
    config, shown = spiked(number)
    run_dir = Path(config.run.dir)
    assert "rollback at step 13: the loss of step 13 is" in shown
    assert "(samples t = 80 to 103)" in shown
    assert "went back to step-00000010" in shown
    # Steps 11 to 13 had the data of places 11 to 13; the same steps are done again on what comes behind.
    places = [*range(1, 11), *range(14, 24)]
    assert trained_on(run_dir) == [(step + 1, 8 * place) for step, place in enumerate(places)]
    lines = [line for line in metrics(run_dir) if "train/loss" in line]
    assert [line["resilience/skipped_samples"] for line in lines] == [0] * 10 + [24] * 10
    assert [line["resilience/rollbacks"] for line in lines] == [0] * 10 + [1] * 10
    assert [line["train/learning_rate"] for line in lines] == [
        learning_rate(step, config.optimizer.lr, 20, config.schedule) for step in range(1, 21)
    ]
    left = [line for line in metrics(run_dir / "previous-1") if "train/loss" in line]
    assert [line["step"] for line in left] == list(range(1, 14))
    (event,) = events(run_dir)
    assert (event["event"], event["step"], event["event/from_step"]) == ("rollback", 10, 13)


@pytest.mark.parametrize("number", [0, 1, 3, 6])
def test_a_run_lost_after_a_rollback_goes_on_bit_for_bit(number: int, spiked: Spiked, tmp_path: Path) -> None:
    clean, _ = spiked(number)
    config = clean.model_copy(update={"run": clean.run.model_copy(update={"dir": str(tmp_path / "killed")})})
    for kill_at in (12, 17):  # before the first save after the rollback, and after it
        assert run_ranks(damaged, 2, config, high_loss, 13, 13, 0, kill_at) == [1, 1]
    assert run_ranks(damaged, 2, config, high_loss, 13, 13) == [EXIT_FINISHED] * 2
    assert losses(tmp_path / "killed") == losses(Path(clean.run.dir))
    assert trained_on(tmp_path / "killed") == trained_on(Path(clean.run.dir))
    states = [candidates(Path(each.run.dir))[0].manifest for each in (clean, config)]
    assert states[0] is not None and states[1] is not None
    assert states[0].state == states[1].state
    assert len(states[0].state["rollbacks"]) == 1 and len(states[0].state["recent_losses"]) == 3
    assert len(events(tmp_path / "killed")) == 1


def test_skipped_steps_in_a_row_roll_back_behind_a_checkpoint_saved_among_them(workspace: Path, tmp_path: Path) -> None:
    config = rolling_back(workspace, tmp_path / "run", checkpoint={"every_steps": 4, "keep_last": 9})
    assert run_ranks(damaged, 2, config, nan_loss, 9, 11, 10) == [EXIT_STOPPED_AFTER_SAVING] * 2
    assert saved_steps(tmp_path / "run") == [10, 8, 4]
    assert run_ranks(damaged, 2, config, nan_loss, 9, 11) == [EXIT_FINISHED] * 2
    assert trained_on(tmp_path / "run") == [
        (step + 1, 8 * place) for step, place in enumerate([*range(1, 9), *range(12, 24)])
    ]
    assert saved_steps(tmp_path / "run") == [20, 16, 12, 8, 4]
    assert [path.name for path in (tmp_path / "run" / "previous-1" / "checkpoints").iterdir()] == ["step-00000010"]


def test_a_checkpoint_that_leads_straight_to_divergence_gives_way_to_an_older_one_then_exit_4(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = rolling_back(
        workspace,
        tmp_path / "run",
        checkpoint={"every_steps": 4, "keep_last": 9},
        resilience={"max_rollbacks": 2},
        data={"workers": 1},
    )
    assert run_ranks(damaged, 2, config, nan_loss, 9, 99) == [EXIT_DIVERGED] * 2
    found = events(tmp_path / "run")  # those of the branches that were left stand at the step that was gone back to
    assert [(line["event"], line["event/from_step"]) for line in found] == [
        *(("skip", 9), ("skip", 10), ("skip", 11), ("rollback", 11)),
        *(("skip", 9), ("skip", 10), ("skip", 11), ("rollback", 11)),
        *(("skip", 5), ("skip", 6), ("skip", 7), ("diverged", 7)),
    ]
    assert [line["step"] for line in found] == [4] * 8 + [5, 6, 7, 7]
    assert [line["event/first_sample"] // 8 for line in found] == [8, 9, 10, 8, 11, 12, 13, 4, 14, 15, 16, 14]
    assert "Training diverged, after 2 rollbacks (resilience.max_rollbacks=2)" in capsys.readouterr().out
    assert saved_steps(tmp_path / "run") == [4]
    manifest = candidates(tmp_path / "run")[0].manifest
    assert manifest is not None and manifest.state["samples"] == 8 * 14 and len(manifest.state["rollbacks"]) == 2


def test_without_a_checkpoint_to_go_back_to_the_run_ends_with_4(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = rolling_back(workspace, tmp_path / "run")
    assert run_ranks(damaged, 2, config, nan_loss, 2, 9) == [EXIT_DIVERGED] * 2
    assert "there is no good checkpoint from before to go back to" in capsys.readouterr().out
    assert saved_steps(tmp_path / "run") == []


def test_a_loss_spike_in_the_last_step_is_seen_before_the_last_save(workspace: Path, tmp_path: Path) -> None:
    config = rolling_back(workspace, tmp_path / "run")
    assert run_ranks(damaged, 2, config, high_loss, 20, 20) == [EXIT_FINISHED] * 2
    places = [*range(1, 16), *range(21, 26)]
    assert trained_on(tmp_path / "run") == [(step + 1, 8 * place) for step, place in enumerate(places)]
    assert saved_steps(tmp_path / "run") == [20, 15, 10, 5]
    stop = rolling_back(workspace, tmp_path / "stop", resilience={"on_divergence": "stop"})
    assert run_ranks(damaged, 2, stop, high_loss, 20, 20) == [EXIT_DIVERGED] * 2
    assert saved_steps(tmp_path / "stop") == [15, 10, 5]
