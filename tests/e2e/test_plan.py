"""`maskwright plan` as a user runs it: with nothing there yet, and beside a run that it describes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode

from launcher.command import console_of_results
from tests.commands import assert_one_card, maskwright
from tests.ranks import tiny_config, train, write_config
from tools.plan.page import print_plan, to_json
from tools.plan.run import PlanOptions, RunPlan, make_plan
from trainer.checkpoint.find import candidates
from trainer.config import Config
from trainer.config.file import load_config
from trainer.errors import EXIT_FINISHED, EXIT_USER_MISTAKE, UserError

# Large enough beside the tokenizer for the size of a checkpoint, and with the attention that FlopCounterMode knows.
MODEL = {"hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 768}


def made_plan(source: str | Path, nodes: int = 1, ranks: int = 1, **options: Any) -> RunPlan:
    given = {"device": None, "bench": None, "vocabulary_size": None, "network_gbit": None, "storage_gb_s": None}
    return make_plan(load_config(source), PlanOptions(nodes=nodes, gpus_per_node=ranks, **{**given, **options}))


def plan_json(source: str | Path, **options: Any) -> dict[str, Any]:
    """What `--json` prints."""
    return json.loads(to_json(made_plan(source, **options)))


def own_config(workspace: Path, folder: Path, **sections: Any) -> Config:
    model = {"overrides": {**MODEL, "max_position_embeddings": 34, "attention_probs_dropout_prob": 0.1}}
    return tiny_config(workspace, folder / "run", **{"model": model, "train": {"steps": 1}, **sections})


def test_a_recipe_on_gpus_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """RoBERTa-base of the paper on 4 × 8 H200, with no data and no tokenizer."""
    monkeypatch.chdir(tmp_path)
    plan = made_plan("roberta-base", nodes=4, ranks=8, device="h200")
    print_plan(plan, console_of_results(as_json=False))
    page = capfd.readouterr().out
    for line in (
        "4 nodes × 8 = 32 × NVIDIA H200, bf16, zero1",
        "124,697,433 parameters; 0.6011 GFLOP a token",
        "8,192 sequences of 512 = 32 micro × 32 ranks × 8 accumulation (exact)",
        "500,000 steps × 4,194,304 = 2,097,152,000,000 tokens (exact)",
        "A vocabulary of 50,265 is taken (--vocab-size)",
        "each GPU sends 725 MB a step: 3 × the parameters",
        "989 TFLOP/s dense bf16, 141 GB at 4.8 TB/s",
    ):
        assert line in page, page
    assert max(map(len, page.splitlines())) <= 120, "it fits a page"
    assert not list(tmp_path.iterdir()), "nothing is written"

    found = json.loads(to_json(plan))
    assert found["run"]["epochs"] == {} and len(found["run"]["unknown"]) == 2
    assert found["checkpoint"]["bytes"] == 14 * 124_697_433
    assert [layout["ranks"] for layout in found["by_gpus"].values()] == [2**power for power in range(11)]
    assert found["deepspeed"]["gradient_accumulation_steps"] == 8
    assert list(found["by_stage"]) == ["1", "2", "3"], "half precision has no stage 0"
    assert found["recommended"]["layout"]["stage"] == 1
    speeds = [layout["tokens_per_second"] for layout in found["by_gpus"].values()]
    assert speeds == sorted(speeds)
    traffic = [layout["step_seconds"]["traffic"] for layout in found["by_gpus"].values()]
    assert traffic[0] == 0.0 and traffic[3] < traffic[4], "from 8 to 16 GPUs it goes over the network"


def test_the_plan_of_a_run_is_what_the_run_turns_out_to_be(workspace: Path, tmp_path: Path) -> None:
    config = own_config(workspace, tmp_path, batch={"global_size": 8, "micro_size": "auto", "memory_gib": 2.0})
    path = write_config(config, tmp_path / "my.yaml")
    found = plan_json(path, ranks=2)
    assert found["run"]["unknown"] == []
    assert found["run"]["accumulation"] * found["run"]["micro_size"] * 2 == 8
    assert train(config, 2) == EXIT_FINISHED
    (checkpoint,) = candidates(tmp_path / "run")
    assert checkpoint.manifest is not None
    assert checkpoint.manifest.model["parameters"] == found["model"]["parameters"]
    assert found["checkpoint"]["bytes"] == pytest.approx(checkpoint.manifest.bytes, rel=0.03)
    assert json.loads((tmp_path / "run" / "deepspeed.json").read_text()) == found["deepspeed"]


@pytest.mark.parametrize("preset", ["zero0", "zero1", "zero3"])
def test_frozen_weights_are_counted_as_the_run_has_them(preset: str, workspace: Path, tmp_path: Path) -> None:
    frozen = own_config(workspace, tmp_path, deepspeed=preset)
    frozen = frozen.model_copy(update={"model": frozen.model.model_copy(update={"frozen": ["roberta.encoder.*"]})})
    whole = plan_json(write_config(own_config(workspace, tmp_path, deepspeed=preset), tmp_path / "whole.yaml"))
    found = plan_json(write_config(frozen, tmp_path / "my.yaml"))
    assert train(frozen) == EXIT_FINISHED
    (checkpoint,) = candidates(tmp_path / "run")
    assert checkpoint.manifest is not None
    for key in ("parameters", "frozen"):
        assert checkpoint.manifest.model[key] == found["model"][key]
    assert found["model"]["parameters"] == whole["model"]["parameters"] and whole["model"]["frozen"] == 0
    assert found["checkpoint"]["bytes"] == pytest.approx(checkpoint.manifest.bytes, rel=0.05)
    assert found["checkpoint"]["bytes"] < whole["checkpoint"]["bytes"]
    assert 2 / 3 < found["model"]["flops_per_token"] / whole["model"]["flops_per_token"] < 1
    saved = 12 * found["model"]["frozen"] - (0 if preset in ("zero1", "zero3") else 4 * found["model"]["frozen"])
    ours, theirs = (plan["chosen"]["memory_bytes"]["optimizer"] for plan in (found, whole))
    assert theirs - ours == saved
    if preset == "zero0":
        page = maskwright("plan", tmp_path / "my.yaml").stdout
        assert f"{found['model']['frozen']:,} of them" in " ".join(page.split())


def test_the_flops_are_those_that_torch_counts(workspace: Path, tmp_path: Path) -> None:
    import torch

    from trainer.model.build import build_model, constant_inputs
    from trainer.model.prediction_head import install
    from trainer.model.source import load_vocabulary
    from trainer.objectives.masking import predictions_per_block

    config = own_config(workspace, tmp_path)
    found = plan_json(write_config(config, tmp_path / "my.yaml"))
    model = build_model(config.model, load_vocabulary(config), 32, seed=0).model
    positions, index = install(model), torch.arange(2 * predictions_per_block(0.15, 30))
    with FlopCounterMode(display=False) as counter:
        with positions.select(index):
            inputs = constant_inputs(model, 32, torch.device("cpu"))
            logits = model(input_ids=torch.zeros(2, 32, dtype=torch.int64), **inputs).logits
        logits.sum().backward()
    assert found["model"]["flops_per_token"] * 2 * 32 == counter.get_total_flops()


def test_a_benchmark_takes_the_place_of_the_model(workspace: Path, tmp_path: Path) -> None:
    config = own_config(workspace, tmp_path)
    path, bench = write_config(config, tmp_path / "my.yaml"), tmp_path / "step.json"
    settings = {"model": "roberta-base", "micro_size": 8, "seq_len": 512, "ranks": 2, "precision": "fp32"}
    ours = {"tokens_per_second": 3000.0, "seconds_per_step": 1.0, "flops_per_token": 1e9, "peak_memory_gib": 1.5}
    result = {
        "benchmark": "step",
        "peaks": {"device": "CPU, 1 threads"},
        "settings": settings,
        "variants": {"ours": ours},
    }
    bench.write_text(json.dumps(result))
    found = plan_json(path, bench=str(bench))
    assert found["chosen"]["tokens_per_second"] == pytest.approx(1.5e12 / found["model"]["flops_per_token"])
    assert found["measured"]["flops"] == 1.5e12

    bench.write_text(json.dumps({**result, "settings": {**settings, "precision": "bf16"}}))
    refused = maskwright("plan", path, "--bench", bench)
    assert_one_card(refused, EXIT_USER_MISTAKE, "measured in bf16", "trains in fp32", "--bench")
    unusable = {
        "it has no 'benchmark'": {},
        "it is of `bench loader`": {**result, "benchmark": "loader"},
        "the variant ours is not in it": {**result, "variants": {"hf": ours}},
        "its speed is 0 FLOP": {**result, "variants": {"ours": {**ours, "tokens_per_second": 0.0}}},
        "its speed is nan": {**result, "variants": {"ours": {**ours, "flops_per_token": float("nan")}}},
        "measured on NVIDIA H200, and the plan is for this": {**result, "peaks": {"device": "NVIDIA H200"}},
    }
    for words, content in unusable.items():
        bench.write_text(json.dumps(content))
        with pytest.raises(UserError, match=words):
            plan_json(path, bench=str(bench))
    with pytest.raises(UserError, match="No such file"):
        plan_json(path, bench=str(tmp_path / "missing.json"))
    with pytest.raises(UserError, match="does not divide into micro-batches of 4 on 3 ranks"):
        plan_json(path, ranks=3)


def test_a_warm_up_and_phases_are_counted_and_auto_divides_all_their_batches(workspace: Path, tmp_path: Path) -> None:
    warmup = {"start_size": 16, "tokens": 5000}
    config = own_config(
        workspace,
        tmp_path,
        data={"phases": [{"seq_len": 16, "until_tokens": 10_000}]},
        batch={"global_size": 48, "micro_size": "auto", "warmup": warmup},
        train={"steps": None, "tokens": 100_000},
    )
    path = write_config(config, tmp_path / "my.yaml")
    page = maskwright("plan", path, "--nodes", "2").stdout
    described = maskwright("validate", path, "--nproc-per-node", "2").stdout
    steps = re.search(r"1,536 tokens a step, ([\d,]+) steps", described)
    assert steps is not None, described
    assert f"length      {steps[1]} steps, up to 1,536 tokens each: 10" in page, page
    assert "48 sequences of 32 = 8 micro × 2 ranks × 3 accumulation" in page, "16, 32 and 48 divide by 8 × 2"
    assert "shorter blocks are reckoned at the speed of full steps" in page


def test_what_phases_change_is_shown_with_the_cost_of_attention(workspace: Path, tmp_path: Path) -> None:
    phases = [
        {"seq_len": 16, "until_tokens": 8 * 16 * 5, "mask_ratio": 0.3, "rope_theta": 10_000},
        {"seq_len": 32, "until_tokens": 8 * 16 * 5 + 8 * 32 * 5, "lr_factor": 0.5},
    ]
    overrides = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "local_attention": 8,
    }
    config = tiny_config(
        workspace,
        tmp_path / "run",
        model={"preset": "modernbert-base", "tokenizer": str(workspace / "tokenizer"), "overrides": overrides},
        data={"phases": phases},
        train={"steps": 15},
    )
    path = write_config(config, tmp_path / "my.yaml")
    page = re.sub(r"\s+", " ", maskwright("plan", path).stdout)
    shares = [found["attention_share_of_flops"] for found in plan_json(path)["run"]["phases"]]
    assert 0 < shares[0] < shares[1] == shares[2] < 0.3, "longer blocks cost more"
    local = "and 10,000 of the local layers"
    for number, words in enumerate(
        (
            f"blocks of 16, 8 a step; up to token 640; 5 steps; masks 0.3; rope theta 10,000 {local}; rate × 1",
            f"blocks of 32, 8 a step; up to token 1,920; 5 steps; masks 0.15; rope theta 160,000 {local}; rate × 0.5",
            f"blocks of 32, 8 a step; 5 steps; masks 0.15; rope theta 160,000 {local}; rate × 1",
        )
    ):
        assert f"phase {number + 1} {words}; attention is {shares[number]:.1%} of the FLOPs" in page, page
    thetas = [found["rope_theta"] for found in plan_json(path)["run"]["phases"]]
    assert thetas == [10_000, 160_000, 160_000]
