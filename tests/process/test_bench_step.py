"""`bench step`: every variant trains the same model on the same batches, and what is said of it is right."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from matplotlib.image import imread
from rich.console import Console

from tests.commands import assert_one_card, call_forked, maskwright, start_maskwright
from tests.tiny_bench import write_tiny_model
from tests.waiting import TIMEOUT_S, wait_for
from tools.bench import step as bench
from tools.bench.step import GROUPS, VARIANTS, StepBenchmark, bench_step, environments, members, require_equal_losses
from tools.bench.step_report import Peaks, StepReport, draw_chart
from tools.bench.step_work import StepMeasurement, StepWork, make_config, make_work_samples, training_batches
from tools.bench.synthetic import learnable_tokens
from trainer.data.manifest import read_data_manifest
from trainer.errors import MaskwrightError

TINY = StepWork(micro_size=2, seq_len=32, steps=3, warmup_steps=1)
MACHINE = {"cpu": "a CPU", "cores": 2, "memory_bytes": 2**34, "load_average": 0.5, "python": "3", "versions": {}}


def quiet() -> Console:
    return Console(file=io.StringIO())


def measure(settings: StepBenchmark) -> StepReport:
    """Runs in a process of its own."""
    return bench_step(settings, quiet())


def measured(seconds: float, losses: list[float], to_loss: float | None = None) -> StepMeasurement:
    return StepMeasurement(
        tokens=8000,
        wall_seconds=seconds,
        cpu_seconds=2 * seconds,
        steps=4,
        phases={"data": 0.001, "forward": 0.1, "backward": 0.2, "optimizer": 0.05},
        first_step_seconds=seconds,
        peak_bytes=2**30,
        losses=losses,
        flops_per_token=1e6,
        operators=[{"name": "aten::mm", "milliseconds": 12.0, "calls": 3.0}],
        seconds_to_loss=to_loss,
    )


def report_of(**rounds: list[StepMeasurement]) -> StepReport:
    named = {name.replace("_", "-"): rows for name, rows in rounds.items()}
    return StepReport(
        settings={**vars(TINY), "threads": 1, "target_loss": None},
        machine=MACHINE,
        peaks=Peaks("a device", 1e12, 2e12),
        variants=[VARIANTS[name] for name in named],
        measurements=named,
        compared=[("ours", "hf")],
        loss_bound=0.1,
    )


def test_all_loops_train_alike_and_are_reported(tmp_path: Path) -> None:
    """Acceptance in small: dropout 0, the losses of Trainer, plain loops and ours agree at each step."""
    work = replace(TINY, model=write_tiny_model(tmp_path), steps=6, warmup_steps=0)
    names = ("hf", "hf-deepspeed", "torch", "torch-memory", "ours")
    files = {"markdown": str(tmp_path / "step.md"), "chart": str(tmp_path / "step.png")}
    settings = StepBenchmark(variants=names, work=work, rounds=1, threads=1, check_losses=True, **files)
    report = call_forked(measure, settings)
    facts = json.loads(report.to_json())
    assert facts["losses"]["agree"] and facts["losses"]["bound"] == 1e-4
    curve = facts["losses"]["curves"]["hf"]
    assert len(curve) == 6 and max(curve) - min(curve) > 0.01, "equal losses would say little"
    assert list(facts["variants"]) == list(names)
    ours = facts["variants"]["ours"]
    assert ours["tokens_per_second"] == pytest.approx(64 / ours["seconds_per_step"])
    assert set(ours["phase_milliseconds"]) == {"data", "forward", "backward", "optimizer"}
    parts = sum(ours["phase_milliseconds"].values())
    assert parts == pytest.approx(1000 * ours["seconds_per_step"], rel=0.1), "the phases are the step"
    assert any(row["name"].startswith("aten::") for row in ours["operators"])
    assert ours["flops_per_token"] == facts["variants"]["hf"]["flops_per_token"] > 0
    assert {"ours/hf", "ours/hf-deepspeed", "ours/torch", "ours/torch-memory"} <= set(facts["ratios"])
    assert facts["settings"]["seq_len"] == 32 and facts["peaks"]["measured"] > 0
    assert "Operators of `ours`" in (tmp_path / "step.md").read_text()
    assert imread(tmp_path / "step.png").shape[1] > 500


def test_two_ranks_and_the_time_to_a_loss(tmp_path: Path) -> None:
    work = replace(TINY, model=write_tiny_model(tmp_path), ranks=2, steps=20, warmup_steps=0, target_loss=100.0)
    settings = StepBenchmark(variants=("hf", "torch", "ours"), work=work, rounds=1, threads=1)
    report = call_forked(measure, settings)
    for variant in report.variants:
        facts = report.facts(variant.name)
        assert facts["seconds_to_loss"] is not None and facts["seconds_to_loss"] > 0
        assert facts["communication_milliseconds"] > 0
        assert len(report.measurements[variant.name][0].losses) == 10, "it ends at the first evaluation"
    assert report.losses_agree


def test_losses_that_differ_are_said_loudly_and_fail_the_check() -> None:
    report = report_of(hf=[measured(2.0, [9.0, 8.0])], ours=[measured(1.0, [9.0, 7.0])])
    assert report.loss_difference == pytest.approx(1.0) and not report.losses_agree
    stream = io.StringIO()
    report.print(Console(file=stream, width=150))
    assert "THE LOSSES DIFFER" in stream.getvalue()
    with pytest.raises(MaskwrightError, match=r"differ by up to 1, more than 0\.1, from step 2 on"):
        require_equal_losses(report)
    broken = report_of(hf=[measured(2.0, [9.0])], ours=[measured(1.0, [float("nan")])])
    with pytest.raises(MaskwrightError, match="from step 1 on"):
        require_equal_losses(broken)
    require_equal_losses(report_of(hf=[measured(2.0, [9.0, 8.0])], ours=[measured(1.0, [9.05, 8.0, 1.0])]))


def test_ratios_are_of_rounds_and_figures_of_medians() -> None:
    report = report_of(
        hf=[measured(4.0, [9.0]), measured(8.0, [9.0]), measured(6.0, [9.0])],
        ours=[measured(2.0, [9.0]), measured(2.0, [9.0]), measured(1.0, [9.0])],
    )
    ratio = json.loads(report.to_json())["ratios"]["ours/hf"]
    assert ratio["tokens_per_second"] == {"median": 4.0, "lowest": 2.0, "highest": 6.0}
    facts = report.facts("ours")
    assert facts["tokens_per_second"] == 4000 and facts["seconds_per_step"] == 0.5
    assert facts["mfu"] == {"measured": pytest.approx(4e-3), "datasheet": pytest.approx(2e-3)}


def test_a_chart_shows_each_variant(tmp_path: Path) -> None:
    report = report_of(hf=[measured(4.0, [9.0])], ours=[measured(1.0, [9.0])])
    draw_chart(report, tmp_path / "chart.png")
    pixels = (255 * imread(tmp_path / "chart.png")[:, :, :3]).round().astype(int).reshape(-1, 3)
    grey, blue = ((pixels == colour).all(axis=1).sum() for colour in ((0xB0, 0xB0, 0xB0), (0x1F, 0x77, 0xB4)))
    assert blue / grey == pytest.approx(4, rel=0.05)


def test_batches_are_the_same_in_every_process_and_learnable() -> None:
    variant = VARIANTS["hf"]
    objective = make_work_samples(TINY, make_config(TINY, variant))
    once, again = (training_batches(TINY, variant, objective) for _ in range(2))
    assert len(once) == TINY.all_steps + 2
    assert all(
        (one.inputs["input_ids"] == other.inputs["input_ids"]).all() for one, other in zip(once, again, strict=True)
    )
    tokens = learnable_tokens(100, 30, seed=0, vocabulary_size=1000)
    assert tokens.min() >= 5 and tokens.max() < 1000
    following = {int(one): int(other) for one, other in zip(tokens[:, 0], tokens[:, 1], strict=True)}
    assert all(following[int(one)] == int(other) for one, other in tokens[:, 2:4] if int(one) in following)


def test_the_ladder_has_rungs_one_over_the_other() -> None:
    rungs = [VARIANTS[name] for name in GROUPS["ladder"]]
    pairs = bench._compared(rungs)
    for below, above in itertools.pairwise(rungs):
        assert (above.name, below.name) in pairs


def test_mistakes_are_refused_before_anything_is_measured(tmp_path: Path) -> None:
    result = maskwright("bench", "step", "--variants", "hf,hf-complie")
    assert_one_card(result, 2, "hf-complie", "hf-compile", "--variants")
    assert_one_card(maskwright("bench", "step", "--model", "roberta-bas"), 2, "roberta-bas")
    assert_one_card(maskwright("bench", "step", "--seq-len", "1024"), 2, "1024")
    for option in ("--chart", "--markdown"):
        refused = maskwright("bench", "step", option, tmp_path / "missing" / "file")
        assert_one_card(refused, 2, "No such file or directory", option, "a folder that exists")
    kept, missing = tmp_path / "kept.md", tmp_path / "missing" / "file"
    kept.write_text("mine")
    for markdown in (kept, tmp_path / "new"):
        assert maskwright("bench", "step", "--markdown", markdown, "--chart", missing).returncode == 2
    assert kept.read_text() == "mine" and not (tmp_path / "new").exists(), "looking at them changes nothing"


def test_prepared_data_take_the_place_of_drawn_tokens(workspace: Path, tmp_path: Path) -> None:
    work = replace(TINY, model=write_tiny_model(tmp_path), data=str(workspace / "data"))
    objective = make_work_samples(work, make_config(work, VARIANTS["ours"]))
    batches = training_batches(work, VARIANTS["ours"], objective)
    vocabulary = objective.vocabulary
    assert vocabulary.size == read_data_manifest(workspace / "data" / "train").vocabulary_size
    assert all(int(batch.inputs["input_ids"].max()) < vocabulary.size for batch in batches)
    settings = StepBenchmark(variants=("torch-masked",), work=work, rounds=1, threads=1)
    report = call_forked(measure, settings)
    (measured,) = report.measurements["torch-masked"]
    assert 0.5 * np.log(vocabulary.size) < measured.losses[0] < 1.5 * np.log(vocabulary.size)
    too_many = ("--data", workspace / "data", "--steps", "100000", "--seq-len", "32")
    assert_one_card(maskwright("bench", "step", *too_many), 2, "are needed", "--data", "lower --steps")


def test_a_group_leaves_out_what_the_machine_cannot_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stream = io.StringIO()
    said = Console(file=stream)
    everything = [name for name in VARIANTS if name not in ("ours-documents", "ours-stable", "ours-muon")]
    here = everything if torch.cuda.is_available() else [name for name in everything if name != "ours-graphs"]
    assert list(members("all", said)) == here
    monkeypatch.setenv("PATH", str(tmp_path))  # no compiler there
    assert not {"hf-compile", "torch-compile", "ours-compile", "ours-graphs"} & set(members("all", said))
    assert "without ours-compile: torch.compile needs a C++ compiler" in stream.getvalue()


def test_a_benchmark_that_is_ended_leaves_nobody_measuring(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path)
    size = ("--micro", "2", "--seq-len", "32", "--steps", "100000", "--rounds", "1")
    bench_process = start_maskwright("bench", "step", "--variants", "torch", "--model", model, "--ranks", "2", *size)
    parent = psutil.Process(bench_process.pid)

    ranks = list[psutil.Process]()

    def are_at_work() -> bool:
        nonlocal ranks
        assert bench_process.poll() is None
        with contextlib.suppress(psutil.Error):  # one that ends meanwhile
            ranks = [child for child in parent.children() if child.cpu_times().user > 0.2]
        return len(ranks) == 2

    wait_for(are_at_work, "two ranks", poll_s=0.1)
    bench_process.terminate()
    bench_process.communicate(timeout=TIMEOUT_S)
    _, alive = psutil.wait_procs(ranks, timeout=TIMEOUT_S)
    assert not alive


def test_the_trainer_on_one_rank_has_no_place_among_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gpu A6: with one, accelerate would wrap the model in DistributedDataParallel."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    places = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    for variant in VARIANTS.values():
        alone, *_ = environments(StepWork(), variant)
        pair = environments(StepWork(ranks=2), variant)
        assert all(places <= set(each) for each in pair)
        if variant.loop == "trainer" and not variant.deepspeed:
            assert not places & set(alone) and alone["CUDA_VISIBLE_DEVICES"] == "3"
        else:
            assert places <= set(alone)
