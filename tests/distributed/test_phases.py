"""A run whose batch grows and whose blocks grow: killed, in other layouts, changed on the way, and what it reports."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.console import make_console
from tests.commands import maskwright
from tests.elastic_matrix import _train_all
from tests.faults import assert_same_weights, kill_a_rank_after_each, with_dropout
from tests.ranks import losses, metrics, run_ranks, tiny_config, train, write_config
from tools.convert import convert
from tools.simulate import SimulateOptions, plan_simulation
from tools.simulate.exactness import check_exactness
from tools.simulate.run import simulate
from trainer.config import Config
from trainer.data.loader import PADDING, SampledBlocks
from trainer.errors import EXIT_FINISHED, EXIT_USER_MISTAKE
from trainer.inputs.inputs import open_inputs
from trainer.model.build import build_model
from trainer.schedule.learning_rate import learning_rate
from trainer.sizing.flops import flops_per_token

# 8 sequences up to sample 50, 16 up to sample 100, then 24; blocks of 16 tokens up to sample 240, then of 32. The step
# before the change of blocks is the rest of its phase.
SIZES = [8] * 7 + [16] * 3 + [24] * 5 + [16] + [24] * 4
LENGTHS = [16] * 16 + [32] * 4
STARTS = [sum(SIZES[:step]) for step in range(len(SIZES))]
TOKENS = sum(size * length for size, length in zip(SIZES, LENGTHS, strict=True))


def growing(make: Any, workspace: Path, run_dir: Path, **sections: Any) -> Config:
    """The run above, by `tiny_config` or `with_dropout`."""
    defaults: dict[str, Any] = {
        "batch": {"global_size": 24, "micro_size": 2, "warmup": {"start_size": 8, "tokens": 1600}},
        "data": {"phases": [{"seq_len": 16, "until_tokens": 3800, "micro_size": 4}]},
        "train": {"steps": None, "tokens": TOKENS - 100},
        "checkpoint": {"every_steps": 3, "keep_last": 99},
    }
    merged = {
        name: {**defaults.get(name, {}), **sections.get(name, {})} if name in defaults else sections[name]
        for name in {**defaults, **sections}
    }
    return make(workspace, run_dir, **merged)


@pytest.fixture(scope="module")
def clean(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """On two ranks with dropout, not interrupted."""
    config = growing(with_dropout, workspace, tmp_path_factory.mktemp("clean") / "run")
    assert train(config, 2) == EXIT_FINISHED
    return config


def run_dir_of(config: Config) -> Path:
    return Path(config.run.dir)


def test_the_steps_are_those_that_the_config_asks_for_and_the_metrics_say_so(clean: Config) -> None:
    lines = metrics(run_dir_of(clean))
    assert [line["step"] for line in lines] == list(range(1, len(SIZES) + 1)), "train.tokens gives the number of steps"
    assert [line["batch/global_size"] for line in lines] == SIZES
    assert [line["batch/seq_len"] for line in lines] == LENGTHS
    assert [line["samples"] for line in lines] == np.cumsum(SIZES).tolist()
    assert [line["tokens"] for line in lines] == np.cumsum(np.array(SIZES) * LENGTHS).tolist()
    rates = [learning_rate(step, clean.optimizer.lr, len(SIZES), clean.schedule) for step in range(1, len(SIZES) + 1)]
    assert [line["train/learning_rate"] for line in lines] == rates
    short, long = (open_inputs(clean, 2).order.orders[phase].blocks[0] for phase in (0, 1))
    passes = [min(240, line["samples"]) / short + max(0, line["samples"] - 240) / long for line in lines]
    assert [line["train/epoch"] for line in lines] == pytest.approx(passes)
    inputs = open_inputs(clean, 2)
    model = build_model(clean.model, inputs.vocabulary, clean.data.seq_len, 0).model
    flops = {length: flops_per_token(model, length, round(0.15 * (length - 2)) / length) for length in (16, 32)}
    assert all(line["throughput/mfu"] is None for line in lines), "a CPU's peak is not known"
    assert flops[32] / flops[16] > 1.01


@pytest.mark.timeout(1200)
def test_killed_in_the_warm_up_and_around_the_change_of_blocks_it_ends_bit_for_bit_as_if_it_had_not_been(
    clean: Config, workspace: Path, tmp_path: Path
) -> None:
    config = growing(with_dropout, workspace, tmp_path / "run", data={"workers": 1})
    command = ("train", write_config(config, tmp_path / "config.yaml"), "--nproc-per-node", "2")
    kill_a_rank_after_each((5, 16), command, tmp_path, tmp_path / "run")
    finished = maskwright(*command)
    assert finished.returncode == EXIT_FINISHED, finished.stdout + finished.stderr
    assert "resuming from step-" in finished.stdout
    assert losses(tmp_path / "run") == losses(run_dir_of(clean))
    assert_same_weights(tmp_path / "run", run_dir_of(clean))


@pytest.mark.parametrize("preset", ["zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"])
def test_every_stage_on_two_ranks_follows_one_rank_and_each_goes_on_from_the_other(
    preset: str, one_rank: Config, workspace: Path, tmp_path: Path
) -> None:
    """Another number of ranks, other micro-batches and another accumulation in every step: the same losses.

    Resumed are step 6, in the warm-up, and step 15, before the rest of the phase.
    """
    reference = losses(run_dir_of(one_rank))
    fresh = growing(tiny_config, workspace, tmp_path / "fresh", deepspeed=preset)
    at_the_end: dict[str, Any] = {"checkpoint": {"every_steps": None}}
    resumed = [
        growing(tiny_config, workspace, tmp_path / f"from-{step}", deepspeed=preset, **at_the_end) for step in (6, 15)
    ]
    for config, step in zip(resumed, (6, 15), strict=True):
        take_checkpoint(one_rank, config, step)
    assert run_ranks(_train_all, 2, [fresh, *resumed]) == [EXIT_FINISHED] * 2
    assert losses(tmp_path / "fresh") == pytest.approx(reference, abs=1e-5)
    for step in (6, 15):
        found = {line["step"]: line["train/loss"] for line in metrics(tmp_path / f"from-{step}")}
        assert found == pytest.approx(dict(enumerate(reference[step:], step + 1)), abs=1e-5)
    back = growing(tiny_config, workspace, tmp_path / "back", **at_the_end)
    take_checkpoint(fresh, back, 9)
    assert train(back) == EXIT_FINISHED
    assert [line["train/loss"] for line in metrics(tmp_path / "back")] == pytest.approx(reference[9:], abs=1e-5)


@pytest.fixture(scope="module")
def one_rank(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """On one rank at stage 1, without dropout, in the largest micro-batches: no accumulation in the first steps."""
    phases = [{"seq_len": 16, "until_tokens": 3800}]
    config = growing(
        tiny_config,
        workspace,
        tmp_path_factory.mktemp("one") / "run",
        data={"phases": phases},
        batch={"micro_size": 8},
    )
    assert train(config) == EXIT_FINISHED
    found = losses(run_dir_of(config))
    assert len(found) == len(SIZES) and found[-1] < found[0] - 0.3, "equal losses say little if it does not learn"
    return config


def test_attention_within_documents_in_every_phase(workspace: Path, tmp_path: Path) -> None:
    one, two = (
        growing(tiny_config, workspace, tmp_path / name, model={"document_attention": True}) for name in ("one", "two")
    )
    assert (train(one), train(two, 2)) == (EXIT_FINISHED, EXIT_FINISHED)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    inputs = open_inputs(one, 1)
    short, long = inputs.attended_tokens
    assert 8 < short < 16 and 16 < long < 32
    assert f"a token attends to {short:.0f} of 16 and then {long:.0f} of 32 on average" in inputs.describe()[-1]


def take_checkpoint(config: Config, target: Config, step: int) -> None:
    """Let a run go on from a checkpoint of another one."""
    name = f"checkpoints/step-{step:08d}"
    shutil.copytree(run_dir_of(config) / name, run_dir_of(target) / name)


def record_and_train(config: Config, record: str) -> int:
    """Runs on each rank: note every (sample, source, block) and the length of its block."""
    from trainer.train import run

    make = SampledBlocks.__getitems__

    def recording(self: SampledBlocks, places: np.ndarray) -> Any:
        batch = make(self, places)
        with open(f"{record}-{os.environ['RANK']}", "a") as file:
            for row, ids in zip(places.tolist(), batch.inputs["input_ids"], strict=True):
                file.write(f"{row[0]} {row[2]} {len(ids)}\n")
        return batch

    SampledBlocks.__getitems__ = recording
    return run(config)


def test_no_block_is_lost_or_doubled_in_either_phase_for_any_batches(workspace: Path, tmp_path: Path) -> None:
    """Several passes of each; a global batch that grows within the first phase and leaves a rest of it."""
    phases = [{"seq_len": 16, "until_tokens": 16 * 3000, "micro_size": 20}]
    data = {"train": str(workspace / "data" / "validation"), "phases": phases}
    batch = {"global_size": 240, "micro_size": 10, "warmup": {"start_size": 40, "tokens": 16 * 1000}}
    length = {"tokens": None, "epochs": 20}
    config = growing(tiny_config, workspace, tmp_path / "run", data=data, batch=batch, train=length)
    order, plan = open_inputs(config, 2).order, open_inputs(config, 2).plan
    assert run_ranks(record_and_train, 2, config, str(tmp_path / "seen")) == [EXIT_FINISHED] * 2
    rows = [tuple(map(int, line.split())) for path in tmp_path.glob("seen-*") for line in path.read_text().splitlines()]
    rows = [row for row in rows if row[0] != PADDING]
    assert sorted(sample for sample, _, _ in rows) == list(range(plan.end_sample))
    short, long = ([block for _, block, length in rows if length == wanted] for wanted in (16, 32))
    assert len(short) == 3120 and len(short) + len(long) == plan.end_sample
    for of_phase, blocks in ((short, order.orders[0].blocks[0]), (long, order.orders[1].blocks[0])):
        whole, begun = divmod(len(of_phase), blocks)
        assert Counter(Counter(of_phase).values()) == +Counter({whole: blocks - begun, whole + 1: begun})
    last_block = 1 / order.orders[1].blocks[0]
    assert 20 - 1e-9 <= sum(order.epochs(plan.end_sample)) < 20 + last_block, "to the sample"
    assert min(len(short) / order.orders[0].blocks[0], len(long) / order.orders[1].blocks[0]) > 2


def spike_in_step_12(config: Config) -> int:
    """Runs on each rank: the loss of the data of step 12 is seven times what it is."""
    import trainer.loop
    from trainer.loop import Loop
    from trainer.train import run

    original = Loop._train_step

    def step(self: Loop, *arguments: Any) -> object:
        loss_sums, first = trainer.loop.loss_sums, self.state.samples

        def high(*inputs: Any) -> Any:
            value = loss_sums(*inputs)
            return value + 6 * value.detach() if first == STARTS[11] else value

        trainer.loop.loss_sums = high
        try:
            return original(self, *arguments)
        finally:
            trainer.loop.loss_sums = loss_sums

    Loop._train_step = step  # type: ignore[method-assign,assignment]
    return run(config)


def test_a_rollback_goes_on_with_the_sizes_of_the_samples_it_goes_on_with(
    workspace: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Steps 10 to 12 are done again with later data: step 10 then has the 24 sequences of sample 152, and not 16."""
    resilience = {"on_divergence": "rollback", "max_loss_ratio": 3, "window": 3}
    config = growing(tiny_config, workspace, tmp_path / "run", resilience=resilience)
    assert run_ranks(spike_in_step_12, 2, config) == [EXIT_FINISHED] * 2
    said = capfd.readouterr().out
    assert f"(samples t = {STARTS[9]} to {STARTS[12] - 1})" in said and "went back to step-00000009" in said
    sizes = [*SIZES[:9], *SIZES[12:], *[24] * 3]
    lines = [line for line in metrics(tmp_path / "run") if "train/loss" in line]
    assert [line["batch/global_size"] for line in lines] == sizes
    assert [line["batch/seq_len"] for line in lines] == [*LENGTHS[:9], *LENGTHS[12:], *[32] * 3]
    trained = sum(size * line["batch/seq_len"] for size, line in zip(sizes, lines, strict=True))
    assert f"finished: 20 steps, {trained:,} tokens" in said
    assert lines[-1]["resilience/skipped_samples"] == STARTS[12] - STARTS[9]


CHANGES: dict[str, tuple[int, dict[str, Any], str]] = {
    "a phase that is over may not end elsewhere": (
        18,
        {"data": {"phases": [{"seq_len": 16, "until_tokens": 3000, "micro_size": 4}]}},
        "blocks of 16, then blocks of 32 from sample 240 on, now blocks of 16, then blocks of 32 from sample 192 on",
    ),
    "nor may what is under way end before what it has seen": (
        12,
        {"data": {"phases": [{"seq_len": 16, "until_tokens": 1200, "micro_size": 4}]}},
        "other phases can begin at token 2,432 at the earliest (data.phases",
    ),
    "the first blocks stay": (3, {"data": {"phases": []}}, "seq_len was 16, now 32"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_has_been_consumed_may_not_change(
    name: str, clean: Config, workspace: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    step, sections, words = CHANGES[name]
    config = growing(with_dropout, workspace, tmp_path / "run", **sections)
    take_checkpoint(clean, config, step)
    assert train(config) == EXIT_USER_MISTAKE
    said = capfd.readouterr().out
    assert f"Checkpoint step-{step:08d} belongs to another run" in said and words in said


def test_what_lies_ahead_may_change_the_warm_up_too_and_it_is_said(
    clean: Config, workspace: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """From step 6 on (sample 48): batches of 24 at once, two short phases more, the last with batches of 12."""
    phases = [
        {"seq_len": 16, "until_tokens": 16 * 72, "micro_size": 4},
        {"seq_len": 24, "until_tokens": 16 * 72 + 24 * 30, "global_size": 12, "micro_size": 6},
    ]
    config = growing(
        with_dropout,
        workspace,
        tmp_path / "run",
        data={"phases": phases},
        batch={"warmup": None},
        train={"tokens": None, "steps": 12},
    )
    take_checkpoint(clean, config, 6)
    assert train(config, 2) == EXIT_FINISHED
    said = capfd.readouterr().out
    assert "batch.warmup {'start_size': 8, 'increment': None, 'tokens': 1600} → None" in said
    lines = metrics(tmp_path / "run")
    assert [(line["batch/global_size"], line["batch/seq_len"]) for line in lines[:5]] == [
        (24, 16),
        *[(12, 24)] * 3,
        (24, 32),
    ]
    order = json.loads((tmp_path / "run" / "data_order.json").read_text())
    assert [phase["first_sample"] for phase in order["phases"]] == [0, 72, 108]


def test_a_batch_that_no_longer_divides_the_rest_of_the_phase_is_filled_up(
    clean: Config, workspace: Path, tmp_path: Path
) -> None:
    """Sample 48, and a phase that ends at 240: with batches of 80 the last one has 32, not a multiple of 40."""
    phases = [{"seq_len": 16, "until_tokens": 3800, "micro_size": 40, "global_size": 80}]
    sections = {"data": {"phases": phases}, "batch": {"warmup": None}, "train": {"tokens": None, "steps": 10}}
    config = growing(with_dropout, workspace, tmp_path / "run", **sections)
    take_checkpoint(clean, config, 6)
    assert train(config) == EXIT_FINISHED
    lines = [line for line in metrics(run_dir_of(config)) if line["step"] > 6]
    assert [line["batch/global_size"] for line in lines] == [80, 80, 32, 24]
    assert [line["samples"] for line in lines] == [128, 208, 240, 264]
    assert all(line["train/loss"] > 0 for line in lines)


def test_validate_a_dry_run_the_simulation_and_the_model_card_show_the_changing_sizes(
    clean: Config, workspace: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = {"validation": str(workspace / "data")}
    sections = {"eval": {"every_steps": 5, "samples": 16}, "train": {"tokens": None, "steps": 20}}
    config = growing(with_dropout, workspace, tmp_path / "run", data=data, **sections)
    inputs = open_inputs(config, 2)
    lines, blocks = "\n".join(inputs.describe()), [order.blocks[0] for order in inputs.order.orders]
    assert f"phase 1: {blocks[0]:,} blocks of 16, up to token 3,840; 16 steps, {240 / blocks[0]:.2f} epochs" in lines
    assert f"phase 2: {blocks[1]:,} blocks of 32; 4 steps, {96 / blocks[1]:.2f} epochs" in lines
    assert "batch warm-up: from 8 sequences a step by 8 to 24 at token 1,600: 10 steps" in lines
    early = growing(with_dropout, workspace, tmp_path / "run", train={"tokens": None, "steps": 5})
    assert f"{blocks[1]:,} blocks of 32; the run ends before it begins" in "\n".join(open_inputs(early, 2).describe())

    assert train(config, 2, dry_run=True) == EXIT_FINISHED
    said = capfd.readouterr().out
    assert all(f"step 1 of 20 of {length} tokens a block  loss " in said for length in (16, 32))
    assert "dry run passed" in said and "evaluation  loss" in said and not (tmp_path / "run").exists()

    path = write_config(config, tmp_path / "config.yaml")
    plan = plan_simulation(str(path), [], SimulateOptions(ranks=2))
    found = check_exactness(plan, plan.order(), lambda done: None)
    assert found.each_sample_once and found.samples == sum(SIZES) == plan.end_sample
    assert plan.order().describe() == inputs.order.describe()
    simulated = simulate(lambda: plan, make_console())
    assert f"{blocks[0]:,} of 14 tokens" in "\n".join(text for _, text in simulated._lines())
    assert [phase["seq_len"] for phase in json.loads(simulated.to_json())["phases"]] == [16, 32]

    convert(str(run_dir_of(clean)), str(tmp_path / "model"), "float32", "5GB", make_console())
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"| tokens seen | {TOKENS:,} |" in card
    assert "| sequence length | 16, 32 from token 3,840 on |" in card
    assert "| batch | 24 sequences, grown from 8 over the first 1,600 tokens |" in card
