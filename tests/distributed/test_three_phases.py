"""A run as encoders have them since ModernBERT: short blocks, then longer ones, then the decay.

Length, share of masks, rope theta, rate and the weights of sources change at its borders. It is killed in each phase,
goes on in other layouts, and what comes out says with which theta it was trained.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from launcher.console import make_console
from tests.commands import maskwright
from tests.elastic_matrix import _train_all
from tests.faults import assert_same_weights, kill_a_rank_after_each
from tests.ranks import losses, metrics, run_ranks, tiny_config, train, write_config
from tools.convert import convert
from trainer.checkpoint.manifest import MODEL_FOLDER
from trainer.config import Config, RopeTheta
from trainer.errors import EXIT_FINISHED, EXIT_USER_MISTAKE, UserError
from trainer.inputs.inputs import open_inputs
from trainer.schedule.learning_rate import learning_rate

# Four steps of 8 blocks each: of 32 tokens, of 64, and of 64.
FIRST, SECOND = 4 * 8 * 32, 4 * 8 * (32 + 64)
STEPS, BORDERS = 12, (4, 8)
THETAS = [RopeTheta(10_000, 10_000), RopeTheta(160_000, 10_000), RopeTheta(160_000, 40_000)]
PHASES: list[dict[str, Any]] = [
    {"seq_len": 32, "until_tokens": FIRST, "micro_size": 4, "mask_ratio": 0.3, "rope_theta": 10_000, "local_rope_theta":
     10_000, "weights": {"a": 1}},
    {"seq_len": 64, "until_tokens": SECOND, "lr_factor": 0.5, "mask_ratio": 0.15, "local_rope_theta": 10_000},
]  # fmt: skip
OVERRIDES = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "local_attention": 8,
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 160_000},
        "sliding_attention": {"rope_type": "default", "rope_theta": 40_000},
    },
}


def three_phases(workspace: Path, run_dir: Path, phases: list[dict[str, Any]] = PHASES, **sections: Any) -> Config:
    data = str(workspace / "data")
    defaults: dict[str, Any] = {
        "model": {
            "preset": "modernbert-base",
            "tokenizer": str(workspace / "tokenizer"),
            "overrides": OVERRIDES,
        },
        "data": {
            "train": [{"path": f"{data}/train", "name": name} for name in ("a", "b")],
            "validation": data,
            "seq_len": 64,
            "phases": phases,
        },
        "objective": {"mask_ratio": 0.05},
        "batch": {"micro_size": 2},
        "schedule": {
            "name": "wsd",
            "warmup_steps": None,
            "warmup_tokens": 2 * 8 * 32,
            "decay": "1-sqrt",
            "decay_tokens": 4 * 8 * 64,
        },
        "train": {"steps": STEPS},
        "checkpoint": {"every_steps": 1, "keep_last": 99},
        "eval": {"every_steps": 4, "samples": 16},
    }
    return tiny_config(workspace, run_dir, **{**defaults, **sections})


@pytest.fixture(scope="module")
def clean(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """On two ranks, not interrupted."""
    config = three_phases(workspace, tmp_path_factory.mktemp("clean") / "run")
    assert train(config, 2) == EXIT_FINISHED
    return config


def run_dir_of(config: Config) -> Path:
    return Path(config.run.dir)


def take_checkpoint(config: Config, target: Config, step: int) -> None:
    """Let a run go on from a checkpoint of another one."""
    name = f"checkpoints/step-{step:08d}"
    shutil.copytree(run_dir_of(config) / name, run_dir_of(target) / name)


@pytest.mark.timeout(1200)
def test_killed_in_each_phase_it_ends_bit_for_bit_as_if_it_had_not_been(
    clean: Config, workspace: Path, tmp_path: Path
) -> None:
    config = three_phases(workspace, tmp_path / "run")
    command = ("train", write_config(config, tmp_path / "config.yaml"), "--nproc-per-node", "2")
    kill_a_rank_after_each((3, 6, 10), command, tmp_path, tmp_path / "run")
    finished = maskwright(*command)
    assert finished.returncode == EXIT_FINISHED, finished.stdout + finished.stderr
    assert losses(tmp_path / "run") == losses(run_dir_of(clean))
    assert_same_weights(tmp_path / "run", run_dir_of(clean))


def test_on_either_side_of_a_border_and_in_another_layout_it_goes_on_as_it_would_have(
    clean: Config, workspace: Path, tmp_path: Path
) -> None:
    """The same bits in the same layout; to rounding on another stage and other micro-batches."""
    reference = losses(run_dir_of(clean))
    at_the_end: dict[str, Any] = {"checkpoint": {"every_steps": None}}
    same = {step: three_phases(workspace, tmp_path / f"same-{step}", **at_the_end) for step in (3, *BORDERS, 9)}
    other = {
        step: three_phases(
            workspace, tmp_path / f"other-{step}", deepspeed=preset, batch={"micro_size": 4}, **at_the_end
        )
        for step, preset in ((3, "zero3"), (4, "zero0"), (6, "zero2"), (8, "zero3"), (10, "zero2_offload"))
    }
    for step, config in (*same.items(), *other.items()):
        take_checkpoint(clean, config, step)
    assert run_ranks(_train_all, 2, [*same.values(), *other.values()]) == [EXIT_FINISHED] * 2
    for step, config in same.items():
        found = {line["step"]: line["train/loss"] for line in metrics(run_dir_of(config)) if "train/loss" in line}
        assert found == dict(enumerate(reference[step:], step + 1))
        assert_same_weights(run_dir_of(config), run_dir_of(clean))
    one = three_phases(workspace, tmp_path / "one", deepspeed="zero0", batch={"micro_size": 8}, **at_the_end)
    take_checkpoint(clean, one, 7)
    assert train(one) == EXIT_FINISHED
    for step, config in (*other.items(), (7, one)):
        found = {line["step"]: line["train/loss"] for line in metrics(run_dir_of(config)) if "train/loss" in line}
        assert found == pytest.approx(dict(enumerate(reference[step:], step + 1)), abs=1e-5)


def theta_in(folder: Path) -> RopeTheta:
    kinds = json.loads((folder / "config.json").read_text())["rope_parameters"]
    return RopeTheta(*(kinds[name]["rope_theta"] for name in ("full_attention", "sliding_attention")))


def phase_of(step: int) -> int:
    return sum(step > border for border in BORDERS)


def test_metrics_checkpoints_and_what_is_converted_say_with_what_each_step_was_made(
    clean: Config, tmp_path: Path
) -> None:
    run_dir, schedule = run_dir_of(clean), open_inputs(clean, 2).config.schedule
    assert (schedule.warmup_steps, schedule.decay_steps) == (2, 4)
    lines = [line for line in metrics(run_dir) if "train/loss" in line]
    peak = clean.optimizer.lr
    factors = [(1.0, 0.5, 1.0)[phase_of(step)] for step in range(1, STEPS + 1)]
    rates = [learning_rate(step, peak, STEPS, schedule) * factors[step - 1] for step in range(1, STEPS + 1)]
    assert [line["train/learning_rate"] for line in lines] == rates
    assert rates[3:8] == [peak, *[peak / 2] * 4] and rates[9] == pytest.approx(peak * (1 - 0.5**0.5))
    assert [line["source/b/tokens"] for line in lines[:4]] == [0] * 4
    assert 0 < lines[4]["source/b/tokens"] < 8 * 64, "1 to 1 from the second phase on"
    evaluations = [line for line in metrics(run_dir) if "eval/loss" in line]
    told = [(line["eval/seq_len"], RopeTheta.of(line, "eval/")) for line in evaluations]
    assert told == [(64, THETAS[max(0, phase_of(step))]) for step in (0, 4, 8, 12)]
    for step in range(1, STEPS + 1):
        folder = run_dir / "checkpoints" / f"step-{step:08d}" / MODEL_FOLDER
        assert theta_in(folder) == THETAS[phase_of(step)], "that of the last step"
    for step in (4, 5, 12):
        target = tmp_path / f"model-{step}"
        convert(str(run_dir / "checkpoints" / f"step-{step:08d}"), str(target), "float32", "5GB", make_console())
        assert theta_in(target) == THETAS[phase_of(step)], "with logits that are proven"
    card = (tmp_path / "model-12" / "README.md").read_text()
    assert f"30% of tokens, 15% from token {FIRST:,} on, 5% from token {SECOND:,} on" in card
    assert (
        f"| rope theta | 10,000 and 10,000 of the local layers, 160,000 and 10,000 of the local layers from token "
        f"{FIRST:,} on, 160,000 and 40,000 of the local layers from token {SECOND:,} on |" in card
    )
    assert f"| sequence length | 32, 64 from token {FIRST:,} on |" in card
    assert f"wsd (decay 1-sqrt), 2 warm-up steps, × 0.5 up to token {SECOND:,}" in card


def test_a_mean_is_of_checkpoints_with_one_theta(clean: Config, tmp_path: Path) -> None:
    run_dir, across, within = str(run_dir_of(clean)), tmp_path / "across", tmp_path / "within"
    with pytest.raises(UserError, match="step-00000003 was trained with a rope theta of 10,000 and 10,000 of"):
        convert(run_dir, str(across), "float32", "5GB", make_console(), average=["3", "6"])
    assert not across.exists()
    convert(run_dir, str(within), "float32", "5GB", make_console(), average=["1", "3"])
    assert theta_in(within) == THETAS[0]


def test_validate_says_what_each_phase_changes(clean: Config) -> None:
    lines = "\n".join(open_inputs(clean, 2).describe())
    ends = ("masks 0.3; rope theta 10,000 and 10,000 of the local layers; rate × 1",
            "masks 0.15; rope theta 160,000 and 10,000 of the local layers; rate × 0.5",
            "masks 0.05; rope theta 160,000 and 40,000 of the local layers; rate × 1")  # fmt: skip
    for number, end in enumerate(ends, 1):
        assert any(line.startswith(f"  phase {number}: ") and line.endswith(end) for line in lines.splitlines()), lines
    assert f"a: 100.00%, 50.00% from token {FIRST:,} on" in lines
    falls = "constant, over the last 4 steps to 0 of it, as 1-sqrt, times the factor of each phase"
    assert f"schedule: 2 steps of warm-up to 0.005, then {falls}" in lines


def test_a_phase_that_the_one_before_reaches_over_is_said_to_have_no_step(workspace: Path, tmp_path: Path) -> None:
    within = {**PHASES[1], "until_tokens": FIRST - 1}  # a step has 256 tokens: four of them reach over both
    config = three_phases(workspace, tmp_path / "run", [{**PHASES[0], "until_tokens": FIRST - 2}, within])
    lines = open_inputs(config, 2).describe()
    assert any(line.startswith("  phase 2: ") and "it has no step, as the last one" in line for line in lines), lines
    assert not any("the run ends" in line for line in lines)


def changed(number: int, **keys: Any) -> list[dict[str, Any]]:
    return [{**phase, **(keys if place == number else {})} for place, phase in enumerate(PHASES)]


CHANGES: dict[str, tuple[int, list[dict[str, Any]], str]] = {
    "the theta of the first phase": (2, changed(0, rope_theta=20_000), "model was ModernBertForMaskedLM"),
    "the theta of a later phase": (
        5,
        changed(1, local_rope_theta=500),
        "the rope theta of phase 2 was 160,000 and 10,000 of the local layers, now 160,000 and 500 of the local layers",
    ),
    "the share of masks": (5, changed(1, mask_ratio=0.2), "on 0.15, now 0.3, from sample 32 on 0.2"),
    "the weights": (5, changed(1, weights={"a": 1}), "the mixture of the 40 samples seen so far"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_has_been_trained_with_may_not_change(
    name: str, clean: Config, workspace: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    step, phases, words = CHANGES[name]
    config = three_phases(workspace, tmp_path / "run", phases)
    take_checkpoint(clean, config, step)
    assert train(config) == EXIT_USER_MISTAKE
    assert words in (said := capfd.readouterr().out), said


def test_what_lies_ahead_may_change_and_a_run_without_phases_may_be_given_some(
    clean: Config, workspace: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ahead = changed(1, rope_theta=320_000, mask_ratio=0.2, weights={"b": 1}, lr_factor=3)
    config = three_phases(workspace, tmp_path / "ahead", ahead, train={"steps": 5}, schedule={"warmup_steps": 1})
    take_checkpoint(clean, config, 4)
    assert train(config) == EXIT_FINISHED
    assert "model.overrides" not in (said := capfd.readouterr().out), said
    assert "local_rope_theta" in said, "what has changed is said"
    assert theta_in(tmp_path / "ahead" / "checkpoints" / "step-00000005" / MODEL_FOLDER) == RopeTheta(320_000, 10_000)

    same = {"full_attention": {"rope_type": "default", "rope_theta": 10_000}}
    own = {**OVERRIDES, "rope_parameters": {**same, "sliding_attention": same["full_attention"]}}
    plain = three_phases(
        workspace,
        tmp_path / "plain",
        phases=[],
        model={"preset": "modernbert-base", "tokenizer": str(workspace / "tokenizer"), "overrides": own},
        train={"steps": 2},
        schedule={"warmup_steps": 1},
    )
    assert train(plain) == EXIT_FINISHED
    phases = [{"seq_len": 64, "until_tokens": 2 * 8 * 64, "rope_theta": 10_000, "local_rope_theta": 10_000}]
    extended = three_phases(workspace, tmp_path / "plain", phases, train={"steps": 3}, schedule={"warmup_steps": 1})
    assert train(extended) == EXIT_FINISHED
    assert theta_in(tmp_path / "plain" / "checkpoints" / "step-00000003" / MODEL_FOLDER) == THETAS[2]
