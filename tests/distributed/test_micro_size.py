"""`batch.micro_size: auto` on real ranks: all agree, it is remembered, and it changes nothing but the split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.commands import assert_one_card, maskwright
from tests.ranks import TWO_LAYERS, allow_fp16, losses, run_ranks, tiny_config, train, write_config
from trainer.config import Config
from trainer.engine.deepspeed_config import load_preset
from trainer.errors import EXIT_FINISHED, EXIT_USER_MISTAKE
from trainer.model.source import load_vocabulary
from trainer.sizing.memory_estimate import MemoryEstimate
from trainer.sizing.micro_batch import RECORD
from trainer.sizing.micro_batch_trial import _first_to_try

RANKS = 2
MIB = 2**20


def auto_config(workspace: Path, run_dir: Path, memory_gib: float | None, **sections: Any) -> Config:
    batch = {"global_size": 16, "micro_size": "auto", "memory_gib": memory_gib}
    model = {"overrides": TWO_LAYERS}  # of one layer the update takes as much as two more sequences
    return tiny_config(workspace, run_dir, **{"train": {"steps": 4}, "batch": batch, "model": model, **sections})


def gib_between(config: Config, below: int, above: int) -> float:
    """A budget into which the one micro-batch fits and the other does not."""
    estimate = MemoryEstimate(config, load_vocabulary(config), load_preset(config.deepspeed), "cpu")
    fits, does_not = (estimate.memory(size, RANKS, 8 // size).peak for size in (below, above))
    assert fits < does_not
    return (fits + does_not) / 2 / 2**30


def record(run_dir: Path) -> list[dict[str, Any]]:
    return json.loads((run_dir / RECORD).read_text())


def test_the_largest_that_fits_is_taken_and_remembered(
    workspace: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    budget = gib_between(auto_config(workspace, tmp_path, None), 2, 4)
    config = auto_config(workspace, tmp_path / "auto", budget)
    assert train(config, RANKS) == EXIT_FINISHED
    said = capfd.readouterr().out
    assert "micro-batch: 2, the largest of 1, 2, 4, 8 that fits (modelled: " in said
    assert "16 sequences a step = 2 micro × 2 ranks × 4 accumulation" in said
    assert [entry["micro_size"] for entry in record(tmp_path / "auto")] == [2]

    given = auto_config(workspace, tmp_path / "given", None, batch={"global_size": 16, "micro_size": 2})
    assert train(given, RANKS) == EXIT_FINISHED
    assert losses(tmp_path / "auto") == losses(tmp_path / "given")

    # What is remembered is used, whatever a search would find now.
    (entry,) = record(tmp_path / "auto")
    (tmp_path / "auto" / RECORD).write_text(json.dumps([{**entry, "micro_size": 4}]))
    assert train(config, RANKS) == EXIT_FINISHED
    said = capfd.readouterr().out
    assert "micro-batch: 4, as in the first start of this layout" in said

    (tmp_path / "auto" / RECORD).write_text('[{"half')
    assert train(config, RANKS, resume="never") == EXIT_FINISHED
    said = capfd.readouterr().out
    assert (
        "micro-batch: searching anew: " in said and "cannot be read" in said and "micro-batch: 2, the largest" in said
    )

    # Another layout searches anew, says why, and the data stay what they were.
    assert train(config, 1, resume="never") == EXIT_FINISHED
    said = capfd.readouterr().out
    assert "micro-batch: searching anew: ranks 2 → 1" in said
    assert [entry["layout"]["ranks"] for entry in record(tmp_path / "auto")] == [2, 1]
    assert losses(tmp_path / "auto") == pytest.approx(losses(tmp_path / "given"), rel=1e-5)


def test_what_validate_a_dry_run_and_a_budget_too_small_say(workspace: Path, tmp_path: Path) -> None:
    budget = gib_between(auto_config(workspace, tmp_path, None), 2, 4)
    path = write_config(auto_config(workspace, tmp_path / "run", budget), tmp_path / "my.yaml")
    validated = maskwright("validate", path, "--nproc-per-node", "2")
    assert validated.returncode == EXIT_FINISHED, validated.stderr
    assert "16 sequences a step = 2 micro × 2 ranks × 4 accumulation" in validated.stdout
    assert "micro-batch: auto, one of 1, 2, 4, 8: on GPUs it is found by trial" in validated.stdout
    assert "on this machine's CPU it is 2 (modelled: " in validated.stdout
    tried = maskwright("train", path, "--nproc-per-node", "2", "--dry-run")
    assert tried.returncode == EXIT_FINISHED, tried.stderr
    assert "micro-batch: 2, the largest of 1, 2, 4, 8 that fits" in tried.stdout + tried.stderr
    assert not (tmp_path / "run").exists()
    refused = maskwright("train", path, "batch.memory_gib=0.0001")
    assert_one_card(refused, EXIT_USER_MISTAKE, "Not even a micro-batch of 1 fits", "batch.micro_size=auto", "zero2")


def _step_after_trial(
    config: Config, folder: Path, failing_ranks: tuple[int, ...] | None, limit: float | None = None
) -> int:
    """Find a micro-batch by trial, where batches above 2 run out of memory on some ranks, and train a step.

    Args:
        limit: of memory, in bytes, which the memory model is asked about.
    """
    from trainer.engine.deepspeed_config import compose
    from trainer.engine.engine import TrainingEngine
    from trainer.model.build import build_model
    from trainer.runtime import distributed
    from trainer.schedule.batch_plan import BatchPlan
    from trainer.sizing import micro_batch_trial as micro_trial
    from trainer.sizing.micro_batch_trial import largest_by_trial

    world = distributed.start()
    vocabulary, found = load_vocabulary(config), None
    tried: list[int] = []
    fits = micro_trial._Trial.fits
    micro_trial._Trial.fits = lambda self, size: tried.append(size) or fits(self, size)  # type: ignore[method-assign]
    micro_trial.limit_memory = lambda _config, _world: limit
    if failing_ranks is not None:
        hook = torch.nn.modules.module.register_module_forward_pre_hook(_run_out(world.rank in failing_ranks))
        found = largest_by_trial(config, vocabulary, world, config.data.seq_len, [1, 2, 4, 8])
        hook.remove()
    plan = BatchPlan(2 * world.size, 2, world.size, 1, config.data.seq_len, total_steps=1)
    built = build_model(config.model, vocabulary, config.data.seq_len, config.run.seed)
    ds_config = compose(config, load_preset(config.deepspeed), plan)
    engine = TrainingEngine(built, ds_config, config.optimizer, world)
    ids, index = torch.full((2, config.data.seq_len), 7), torch.arange(4)
    norms = []
    for _ in range(2):
        torch.manual_seed(world.rank)
        logits = engine.network({"input_ids": ids + world.rank}, index).logits
        engine.backward(torch.nn.functional.cross_entropy(logits, ids.flatten()[:4]))
        assert engine.step(1e-2)
        norms.append(engine.grad_norm)
    (folder / f"rank-{world.rank}.json").write_text(json.dumps([found, norms, tried]))
    distributed.stop()
    return 0


def _run_out(here: bool) -> Any:
    def fail(module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        if not here or not isinstance(module, torch.nn.Embedding):
            return
        is_traced = arguments[0].device.type == "meta"  # by the memory model, before the trial
        if arguments[0].shape[0] > 2 and not is_traced:
            raise torch.OutOfMemoryError("CUDA out of memory (made by the test)")

    return fail


@pytest.mark.parametrize(("preset", "failing_ranks"), [("zero1", (1,)), ("zero3", (0, 1))])
def test_a_trial_ends_at_the_first_that_fails_on_any_rank_and_leaves_nothing_behind(
    preset: str, failing_ranks: tuple[int, ...], workspace: Path, tmp_path: Path
) -> None:
    config = auto_config(workspace, tmp_path / "run", None, deepspeed=preset)
    results = []
    for name, failing in (("tried", failing_ranks), ("plain", None)):
        (tmp_path / name).mkdir()
        assert run_ranks(_step_after_trial, RANKS, config, tmp_path / name, failing) == [0, 0]
        results.append([json.loads((tmp_path / name / f"rank-{rank}.json").read_text()) for rank in range(RANKS)])
    tried, plain = results
    assert [found for found, _, _ in tried] == [2, 2]
    assert [norms for _, norms, _ in tried] == [norms for _, norms, _ in plain]


@pytest.mark.parametrize(
    ("foreseen", "first", "tried"), [(0, 1, [1, 2, 4]), (2, 1, [1, 2, 4]), (4, 2, [2, 4]), (8, 4, [4, 1, 2])]
)
def test_a_trial_begins_with_half_of_what_is_foreseen_and_with_less_where_that_was_too_much(
    foreseen: int, first: int, tried: list[int], workspace: Path, tmp_path: Path
) -> None:
    """Gpu A4: each size costs a compilation. What fits is the same, whatever was foreseen: here 2."""
    config = auto_config(workspace, tmp_path / "run", None, deepspeed="zero0")  # the others' buckets hide all else
    estimate = MemoryEstimate(config, load_vocabulary(config), load_preset(config.deepspeed), "cuda")
    limit = estimate.memory(foreseen, 1, 16 // foreseen).peak if foreseen else 1.0
    vocabulary = load_vocabulary(config)
    assert [1, 2, 4, 8][_first_to_try(config, vocabulary, 1, config.data.seq_len, [1, 2, 4, 8], limit)] == first
    assert run_ranks(_step_after_trial, 1, config, tmp_path, (0,), limit) == [0]
    found, _norms, sizes = json.loads((tmp_path / "rank-0.json").read_text())
    assert (found, sizes) == (2, tried)


def _state_after_a_trial(config: Config) -> int:
    """Runs on a rank: say how many of AdamW's flat partitions have moments after a micro-batch has fitted."""
    from trainer.objectives.registry import make_criterion
    from trainer.runtime import distributed
    from trainer.sizing.micro_batch_trial import _Trial

    allow_fp16()
    world = distributed.start()
    trial = _Trial.start(config, load_vocabulary(config), world, config.data.seq_len, 1, make_criterion(config))
    assert trial is not None
    assert trial.fits(4)
    state = trial.engine._engine.optimizer.optimizer.state
    print(f"moments of {sum('exp_avg' in of_one for of_one in state.values())} partitions")
    distributed.stop()
    return 0


def test_a_trial_in_fp16_has_the_optimizers_state(
    workspace: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Gpu A9: a step that is skipped makes none, and what fits without it does not fit the run."""
    config = auto_config(workspace, tmp_path, None, train={"precision": "fp16", "steps": 4})
    assert run_ranks(_state_after_a_trial, 1, config) == [0]
    assert "moments of 2 partitions" in capfd.readouterr().out
