"""`bench recipe`: all arms begin with the same model and are judged by the same blocks, and what is said is right."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path

import pytest
from matplotlib.image import imread
from rich.console import Console
from transformers import get_scheduler

from tests.commands import assert_one_card, maskwright
from tests.ranks import tiny_config, write_config
from tools.bench.recipe import RecipeBenchmark, bench_recipe, cut_at, read_curve
from tools.bench.recipe_report import Arm, RecipeMeasurement, RecipeReport, draw_curves
from tools.bench.recipe_trainer import scheduler_arguments
from trainer.checkpoint.manifest import read_checkpoint_manifest, step_folder
from trainer.config import ScheduleConfig
from trainer.errors import UserError
from trainer.schedule.learning_rate import learning_rate

MACHINE = {"cpu": "a CPU", "cores": 2, "memory_bytes": 2**34, "load_average": 0.5, "python": "3", "versions": {}}


def measured(*curve: tuple[int, int, float, float]) -> RecipeMeasurement:
    return RecipeMeasurement(int(curve[-1][1]), curve[-1][2], 1.0, [list(point) for point in curve])


def report_of(target: float | None, **arms: list[RecipeMeasurement]) -> RecipeReport:
    first, seeds = next(iter(arms)), [*range(len(next(iter(arms.values()))))]
    named = [Arm(name, f"what {name} is") for name in arms]
    return RecipeReport({"seeds": seeds}, MACHINE, named, arms, target, first)


def test_every_arm_begins_with_the_same_model_and_ends_at_the_loss(workspace: Path, tmp_path: Path) -> None:
    sections = {"data": {"validation": str(workspace / "data")}, "eval": {"every_steps": None, "samples": 8}}
    config = tiny_config(workspace, tmp_path / "unused", train={"steps": 30}, **sections)
    path = write_config(config, tmp_path / "tiny.yaml")
    chart = tmp_path / "curves.png"
    done = maskwright(
        "bench", "recipe", path, "optimizer.eps=1e-7", "--to-loss", "5.9", "--seeds", "4", "--every-steps", "5",
        "--dir", tmp_path / "runs", "--chart", chart, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    arms = json.loads(done.stdout)["arms"]
    assert list(arms) == [str(path), "trainer", "trainer-tuned"]
    (ours,), (usual,), (tuned,) = (arm["curves"] for arm in arms.values())
    assert usual[0][3] == pytest.approx(ours[0][3], abs=1e-5), "the loss of the first weights"
    assert tuned[0][3] == pytest.approx(ours[0][3], abs=1e-5)
    # 5 steps of 8 sequences of 32 tokens lie between two evaluations of each.
    assert [point[1] for point in ours] == [number * 5 * 8 * 32 for number in range(len(ours))]
    assert [point[1] for point in tuned] == [number * 5 * 8 * 32 for number in range(len(tuned))]
    assert usual[-1][1] == 30 * 8 * 32 and usual[-1][3] > 5.9, "5e-5 does not get there"
    for curve in (ours, tuned):
        assert curve[-1][3] <= 5.9 < curve[-2][3] and curve[-1][1] < 30 * 8 * 32, "it ends where it has got there"
        assert all(before[2] < after[2] for before, after in itertools.pairwise(curve))
    assert imread(chart).shape[1] > 1000
    assert "eps: 1.0e-07" in (tmp_path / "runs" / "recipe-0-seed-4" / "config.yaml").read_text()


@pytest.mark.parametrize(
    "schedule",
    [
        ScheduleConfig(name="linear", warmup_steps=5),
        ScheduleConfig(name="cosine", warmup_steps=5, min_ratio=0.1),
        ScheduleConfig(name="wsd", warmup_steps=5, decay_fraction=0.25, min_ratio=0.1),
        ScheduleConfig(name="wsd", warmup_steps=5, decay="1-sqrt", decay_steps=12),
        ScheduleConfig(name="constant", warmup_steps=5),
    ],
    ids=lambda schedule: f"{schedule.name} {schedule.decay}",
)
def test_the_tuned_trainer_has_the_rates_of_the_recipe(schedule: ScheduleConfig) -> None:
    import torch

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    given = scheduler_arguments(schedule, total_steps=40)
    scheduler = get_scheduler(
        given["lr_scheduler_type"], optimizer, given["warmup_steps"], 40, given["lr_scheduler_kwargs"]
    )
    for step in range(1, 40):
        optimizer.step()
        scheduler.step()
        if schedule.name == "wsd" and step < 5:
            continue  # Trainer's warm-up begins at the floor, where it has one
        # Trainer's first update has the rate of step 0, so it is one behind.
        assert scheduler.get_last_lr()[0] == pytest.approx(learning_rate(step, 2.0, 40, schedule)), step


def test_a_curve_counts_the_seconds_of_training_alone(tmp_path: Path) -> None:
    lines = [
        {"step": 0, "samples": 0, "tokens": 0, "time": 0.0, "eval/loss": 7.0},
        {"step": 1, "samples": 8, "tokens": 100, "time": 1.0, "throughput/tokens_per_second": 50.0},
        {"step": 5, "samples": 40, "tokens": 500, "time": 9.0, "throughput/tokens_per_second": 200.0},
        {"step": 5, "samples": 40, "tokens": 500, "time": 99.0, "eval/loss": 6.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_curve(tmp_path) == [[0, 0, 0.0, 7.0], [5, 500, 4.0, 6.0]]
    curve = [[0, 0, 0.0, 7.0], [5, 500, 4.0, 6.0], [10, 1000, 8.0, 5.0]]
    assert cut_at(curve, 6.0) == curve[:2] and cut_at(curve, 1.0) == cut_at(curve, None) == curve


def test_what_was_not_reached_has_no_figure_and_ratios_are_by_seed(tmp_path: Path) -> None:
    start = (0, 0, 0.0, 9.0)
    report = report_of(
        5.0,
        ours=[measured(start, (10, 100, 1.0, 4.9)), measured(start, (10, 100, 2.0, 5.0))],
        slow=[measured(start, (20, 400, 8.0, 5.0)), measured(start, (20, 300, 8.0, 4.0))],
        lost=[measured(start, (10, 100, 1.0, 4.9)), measured(start, (20, 300, 8.0, 5.1))],
    )
    facts = {name: report.facts(name) for name in ("ours", "slow", "lost")}
    assert facts["ours"]["seconds_to_loss"] == {"median": 1.5, "lowest": 1.0, "highest": 2.0}
    assert facts["slow"]["over_first"]["seconds_to_loss"] == {"median": 6.0, "lowest": 4.0, "highest": 8.0}
    assert facts["slow"]["over_first"]["tokens_to_loss"]["median"] == 3.5
    assert facts["lost"]["seconds_to_loss"] is None and facts["lost"]["reached"] == 1
    stream = io.StringIO()
    report.print(Console(file=stream, width=200))
    assert "1 of 2" in stream.getvalue() and "slow takes 6.00 (4.00–8.00) × the seconds" in stream.getvalue()
    assert "| lost | 1 of 2 | 1 of 2 |" in report.to_markdown()
    draw_curves(report, tmp_path / "curves.png")
    assert imread(tmp_path / "curves.png").std() > 0.01


def test_a_loss_that_the_first_weights_have_takes_no_time_and_is_no_measure(tmp_path: Path) -> None:
    start = (0, 0, 0.0, 6.0)
    report = report_of(7.0, ours=[measured(start)], later=[measured((0, 0, 0.0, 7.5), (5, 100, 1.0, 6.0))])
    facts = {name: report.facts(name) for name in ("ours", "later")}
    assert facts["ours"]["seconds_to_loss"]["median"] == 0 and facts["ours"]["tokens_per_second"]["median"] == 0
    assert facts["later"]["over_first"] == {"seconds_to_loss": None, "tokens_to_loss": None}
    assert "| ours | 0 | 0 |" in report.to_markdown()
    draw_curves(report, tmp_path / "curves.png")


NOT_BY_TRAINER = {
    "pair": ({"objective": {"pair": {"task": "sop"}}}, "both", "objective.pair"),
    "teacher": ({"objective": {"teacher": {"model": "teacher"}}}, "defaults", "objective.teacher"),
    "attention": ({"model": {"document_attention": True}}, "defaults", "model.document_attention"),
    "rows": ({"data": {"samples": "documents"}}, "tuned", "data.samples"),
    "weights": ({"data": {"train": [{"path": "a", "weight": 3}, {"path": "b"}]}}, "defaults", "data.train"),
    "phases": ({"data": {"phases": [{"seq_len": 16, "until_tokens": 9}]}}, "tuned", "data.phases"),
    "growing batch": ({"batch": {"warmup": {"start_size": 2, "tokens": 9}}}, "both", "batch.warmup"),
}


@pytest.mark.parametrize("name", NOT_BY_TRAINER)
def test_what_trainer_would_not_do_is_refused_before_anything_is_trained(
    name: str, workspace: Path, tmp_path: Path
) -> None:
    """Or hours of the first arm would go before an assertion of the second, or a comparison with something else."""
    sections, against, key = NOT_BY_TRAINER[name]
    held_out = {"data": {"validation": "auto", **sections.get("data", {})}}
    path = str(
        write_config(tiny_config(workspace, tmp_path / "unused", **{**sections, **held_out}), tmp_path / "c.yaml")
    )
    with pytest.raises(UserError, match="Trainer is compared") as caught:
        bench_recipe(RecipeBenchmark((path,), against=against), Console())
    assert key in caught.value.where
    assert ("--against defaults" in caught.value.remedy) == (name in ("phases", "growing batch"))


def test_recipes_with_other_masks_are_judged_by_those_of_the_first(workspace: Path, tmp_path: Path) -> None:
    sections = {"data": {"validation": str(workspace / "data")}, "eval": {"samples": 8}, "train": {"steps": 1}}
    paths = [
        write_config(
            tiny_config(workspace, tmp_path / "unused", objective={"mask_ratio": ratio}, **sections),
            tmp_path / f"{ratio}.yaml",
        )
        for ratio in (0.15, 0.4)
    ]
    folder = tmp_path / "runs"
    asked = RecipeBenchmark(tuple(map(str, paths)), against="none", every_steps=1, folder=str(folder))
    report = bench_recipe(asked, Console(quiet=True))
    less, more = (report.measurements[str(path)][0].curve for path in paths)
    assert less[0][3] == more[0][3], "the same first weights, blocks and masks"
    assert less[1][3] != more[1][3], "trained with others"
    runs = [folder / f"recipe-{number}-seed-0" / "checkpoints" for number in (0, 1)]
    first, second = (read_checkpoint_manifest(step_folder(run, 1)).state["evaluated_on"] for run in runs)
    assert second == f"{first}, 0.15 of their tokens predicted", "no best of one is a best of the other"


def test_what_cannot_be_compared_is_refused(workspace: Path, tmp_path: Path) -> None:
    alone = write_config(tiny_config(workspace, tmp_path / "unused"), tmp_path / "alone.yaml")
    assert_one_card(maskwright("bench", "recipe", alone), 2, "no held-out data", "data.validation")
    assert_one_card(maskwright("bench", "recipe", "train.steps=3"), 2, "no config")
    assert_one_card(maskwright("bench", "recipe", alone, alone), 2, "each config once")
    causal = ["data.validation=auto", "objective.name=clm", "model.preset=gpt2", "model.overrides={}"]
    assert_one_card(maskwright("bench", "recipe", alone, *causal), 2, "masked language modelling", "--against none")
    assert maskwright("bench", "recipe", alone, "--seeds", "0,x").returncode == 2
    short = write_config(
        tiny_config(workspace, tmp_path / "unused", data={"seq_len": 16, "validation": "auto"}), tmp_path / "short.yaml"
    )
    held_out = ["data.validation=auto", "--against", "none"]
    assert_one_card(
        maskwright("bench", "recipe", alone, short, *held_out), 2, "could not be compared", "data.seq_len is 16 and 32"
    )
