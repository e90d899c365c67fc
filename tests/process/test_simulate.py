"""The simulation: it agrees with training, finds what is wrong with an order, and counts pages right."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from launcher.cli import app
from tests.commands import assert_one_card, maskwright
from tools.simulate import SimulatedPlan, SimulateOptions, exactness, plan_simulation
from tools.simulate.exactness import Exactness, SeenNumbers, check_exactness
from tools.simulate.locality import PAGE_BYTES, measure_locality
from tools.simulate.plan import SimulatedSource
from trainer.config import DataConfig, SourceConfig
from trainer.config.file import load_config
from trainer.data.order.run_order import RunOrder
from trainer.data.order.sample_order import rank_share
from trainer.errors import UserError
from trainer.inputs.inputs import open_inputs


def small_plan(seq_len: int = 66, window_chunks: int = 8, **changes: Any) -> SimulatedPlan:
    """Two sources of a few thousand blocks, one with shards that end within a block; several epochs."""
    train = [SourceConfig(path="a", weight=3.0), SourceConfig(path="b", weight=1.0)]
    plan = SimulatedPlan(
        data=DataConfig(train=train, seq_len=seq_len, chunk_blocks=32, window_chunks=window_chunks),
        sources=(
            SimulatedSource("a", np.array([50_000, 1, 70_003]), 2),
            SimulatedSource("b", np.array([40_000]), 2),
        ),
        seed=4,
        ranks=8,
        global_size=64,
        steps=200,
        total_steps=200,
        first_sample=1000,
    )
    return replace(plan, **changes)


def check(plan: SimulatedPlan, order: RunOrder | None = None) -> Exactness:
    return check_exactness(plan, order or plan.order(), lambda done: None)


def test_every_sample_once_over_several_epochs():
    plan = small_plan()
    found = check(plan)
    assert found.each_sample_once and found.samples == 200 * 64
    assert (found.misplaced, found.differing_shares, found.repeated_blocks) == (0, 0, 0)
    assert found.own_calls == 8 + 199 * exactness.OWN_CALLS_A_STEP
    assert min(plan.order().epochs(plan.end_sample)) > 2
    chunks = []
    for step in range(plan.steps):
        sources, blocks = plan.order().locate(np.arange(64) + plan.first_sample + step * 64)
        chunks.append(len(set(zip(sources.tolist(), (blocks // 32).tolist(), strict=True))))
    assert found.chunks_a_batch == pytest.approx(np.mean(chunks))


@pytest.mark.parametrize("ranks", [1, 2, 64])
def test_each_rank_is_asked_for_its_share(ranks: int, monkeypatch: pytest.MonkeyPatch):
    asked = set()

    def noting(samples: Any, sources: Any, blocks: Any, rank: int, world_size: int) -> Any:
        asked.add((rank, world_size))
        return rank_share(samples, sources, blocks, rank, world_size)

    monkeypatch.setattr(exactness, "rank_share", noting)
    assert check(small_plan(ranks=ranks, steps=3)).each_sample_once
    assert {(rank, ranks) for rank in range(ranks)} <= asked


def test_a_rank_with_another_ones_share_is_found(monkeypatch: pytest.MonkeyPatch):
    def wrong(samples: Any, sources: Any, blocks: Any, rank: int, world_size: int) -> Any:
        return rank_share(samples, sources, blocks, 4 if rank == 5 else rank, world_size)

    monkeypatch.setattr(exactness, "rank_share", wrong)
    found = check(small_plan())
    assert found.differing_shares == 101 and not found.each_sample_once  # rank 5 is asked at every second step


def test_a_sample_with_two_ranks_is_found(monkeypatch: pytest.MonkeyPatch):
    def wrong(samples: Any, sources: Any, blocks: Any, rank: int, world_size: int) -> Any:
        share = rank_share(samples, sources, blocks, rank, world_size)
        if world_size == 1:
            share[0] = share[-1]
        return share

    monkeypatch.setattr(exactness, "rank_share", wrong)
    found = check(small_plan())
    assert found.misplaced == 2 * 200 and not found.each_sample_once


def test_a_block_that_comes_twice_in_an_epoch_is_found():
    class Repeating(RunOrder):
        def locate(self, samples: np.ndarray) -> Any:
            sources, blocks = super().locate(samples)
            return sources, blocks // 2 * 2

    plan = small_plan()
    order = plan.order()
    order.__class__ = Repeating
    found = check(plan, order)
    assert found.repeated_blocks > 100 and not found.each_sample_once


@given(st.lists(st.lists(st.integers(0, 5000) | st.integers(2**40, 2**40 + 99), max_size=30), max_size=8))
def test_seen_numbers_is_a_set(batches: list[list[int]]):
    seen, known = SeenNumbers(), set[int]()
    for batch in batches:
        repeats = len(batch) - len(set(batch) - known)
        assert seen.add(np.array(batch, np.uint64)) == repeats
        known |= set(batch)


def test_seen_numbers_far_apart():
    seen, numbers = SeenNumbers(), np.arange(3000, dtype=np.uint64) * np.uint64(10**15)
    assert seen.add(numbers) == 0 and seen.add(numbers) == 3000


@pytest.mark.parametrize("token_bytes", [2, 4])
def test_locality_counts_pages_as_files_have_them(token_bytes: int):
    plan = small_plan(seq_len=1026, global_size=32, first_sample=0)
    plan = replace(
        plan, sources=tuple(replace(s, token_bytes=token_bytes, shard_tokens=s.shard_tokens * 9) for s in plan.sources)
    )
    order = plan.order()
    found, samples = measure_locality(plan, order)
    assert [row.readers for row in found] == [1, 2, 4, 8, 16, 32]
    assert samples == 256 // 32 * 32  # a window
    for row in found:
        pages = [pages_of_reader(plan, order, reader, row.readers, samples) for reader in range(row.readers)]
        ratios = np.array(pages) * PAGE_BYTES / (samples // row.readers * plan.payload(0) * token_bytes)
        assert (row.mean, row.worst) == pytest.approx((ratios.mean(), ratios.max()))
        assert row.blocks_a_step == 32 // row.readers


def pages_of_reader(plan: SimulatedPlan, order: RunOrder, reader: int, readers: int, samples: int) -> int:
    """The same once more, a token file and a byte range at a time."""
    pages = set()
    for start in range(0, samples, plan.global_size):
        batch = np.arange(start, start + plan.global_size)
        sources, blocks = order.locate(batch)
        share = rank_share(batch, sources, blocks, reader, readers)
        for source, block in zip(sources[share].tolist(), blocks[share].tolist(), strict=True):
            begin, end, base = block * plan.payload(0), (block + 1) * plan.payload(0), 0
            for shard, tokens in enumerate(plan.sources[source].shard_tokens.tolist()):
                low, high = max(begin, base) - base, min(end, base + tokens) - base
                if low < high:
                    size = plan.sources[source].token_bytes
                    numbers = range(low * size // PAGE_BYTES, (high * size - 1) // PAGE_BYTES + 1)
                    pages |= {(source, shard, number) for number in numbers}
                base += tokens
    return len(pages)


def test_a_usual_batch_is_read_locally():
    """Pages read over bytes used at most 1.2 for 8 readers, 2 for 64; here in a window of a sixteenth part."""
    plan = plan_simulation(None, [], SimulateOptions(tokens=10**13, shards=20_000, first_sample=10**12))
    data = plan.data.model_copy(update={"window_chunks": 64})
    plan = replace(plan, data=data, global_size=8192)
    ratios = {row.readers: row.worst for row in measure_locality(plan, plan.order())[0]}
    assert ratios[1] == pytest.approx(1.0, abs=0.01)
    assert ratios[8] <= 1.2 and ratios[64] <= 2.0
    assert sorted(ratios) == [2**power for power in range(13)]


def test_ten_trillion_tokens_on_four_thousand_ranks():
    options = "--tokens 10T --shards 20000 --seq-len 512 --ranks 4096 --steps 20 --start-sample 1T --json"
    result = maskwright("data", "simulate", *options.split())
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["tokens"] == 10**13 and facts["blocks"] == 10**13 // 510
    assert facts["sources"][0]["shards"] == 20_000
    assert facts["cold_sample"] == 10**12 and facts["cold_seconds"] < 5.0  # milliseconds
    assert facts["peak_bytes"] < 200e6
    assert facts["each_sample_once"] and facts["samples"] == 20 * facts["global_size"] == 20 * 8192
    assert facts["own_calls"] >= 4096
    assert [row["readers"] for row in facts["locality"]] == [2**power for power in range(13)]


@pytest.fixture
def manifests(workspace: Path, tmp_path: Path) -> Path:
    """The workspace's data without its shards."""
    shutil.copytree(workspace / "data", tmp_path / "data", ignore=shutil.ignore_patterns("*.tok", "*.doc", "*.sum"))
    return tmp_path / "data"


def test_a_config_is_simulated_as_it_trains(workspace: Path, manifests: Path, tmp_path: Path):
    train = [{"path": "DATA/train", "weight": 2.0}, {"path": "DATA/validation", "weight": 1.0}]
    config = {
        "run": {"dir": "unused", "seed": 11},
        "model": {"preset": "roberta-base", "tokenizer": str(workspace / "tokenizer")},
        "data": {"train": train, "seq_len": 32, "chunk_blocks": 16, "window_chunks": 4},
        "batch": {"global_size": 12, "micro_size": 2},
        "train": {"epochs": 3, "precision": "fp32"},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config).replace("DATA", str(workspace / "data")))
    inputs = open_inputs(load_config(path), world_size=6)
    path.write_text(yaml.safe_dump(config).replace("DATA", str(manifests)))
    plan = plan_simulation(str(path), [], SimulateOptions())
    assert plan.order().describe() == inputs.order.describe()
    assert (plan.ranks, plan.global_size, plan.total_steps) == (6, 12, inputs.plan.total_steps)
    assert plan.steps == min(1000, plan.total_steps)

    result = maskwright("data", "simulate", str(path), "batch.global_size=24", "--ranks", "3", "--steps", "50")
    assert result.returncode == 0, result.stderr
    assert "yes: 1,200 samples" in result.stdout and "3 ranks × 50 steps" in result.stdout


def test_a_folder_is_simulated_from_its_manifest(manifests: Path):
    plan = plan_simulation(str(manifests), [], SimulateOptions(seq_len=34, ranks=4, global_size=16, steps=7))
    assert plan.sources[0].tokens == json.loads((manifests / "train" / "manifest.json").read_text())["tokens"]
    assert (plan.payload(0), plan.total_steps, plan.data.chunk_blocks, plan.data.window_chunks) == (32, 7, 1024, 1024)
    assert check(plan).each_sample_once


@pytest.mark.parametrize(
    ("source", "overrides", "options", "words"),
    [
        (None, [], {"ranks": 3, "global_size": 8}, ["does not divide over 3 ranks", "6 or 9"]),
        (None, [], {"steps": 0}, ["at least 1", "--steps 0"]),
        (None, [], {"tokens": 3, "shards": 10}, ["cannot fill 10 shards", "--shards"]),
        (None, [], {"tokens": 10**6, "shards": 1, "seq_len": 2}, ["greater than or equal to 8", "--seq-len 2"]),
        ("demo", [], {"seq_len": 128}, ["--seq-len stands in the config"]),
        ("DATA", [], {"tokens": 5}, ["--tokens describes data on paper"]),
        ("DATA", ["batch.global_size=4"], {}, ["is a data folder", "batch.global_size=4"]),
        ("nosuch.yaml", [], {}, ["nosuch.yaml", "recipes"]),
        (".", [], {}, ["not a prepared data set"]),
    ],
)
def test_mistakes(source: str | None, overrides: list[str], options: dict[str, int], words: list[str], workspace: Path):
    folder = str(workspace / "data") if source == "DATA" else source
    with pytest.raises(UserError) as caught:
        plan_simulation(folder, overrides, SimulateOptions(**options))
    assert all(word in str(caught.value) for word in words)


def test_a_mistake_is_a_card():
    assert_one_card(maskwright("data", "simulate", "--ranks", "3", "--global-batch", "8"), 2, "6 or 9")
    usage = maskwright("data", "simulate", "--tokens", "10X")
    assert usage.returncode == 2 and "'10X' is no whole number" in usage.stderr


def test_an_order_that_is_not_exact_ends_with_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: Any):
    def wrong(samples: Any, sources: Any, blocks: Any, rank: int, world_size: int) -> Any:
        return rank_share(samples, sources, blocks, (rank + 1) % world_size, world_size)

    monkeypatch.setattr(exactness, "rank_share", wrong)
    arguments = "data simulate --tokens 1M --shards 3 --ranks 4 --global-batch 16 --steps 3"
    with pytest.raises(SystemExit) as end:
        app(shlex.split(arguments))
    assert end.value.code == 1
    assert "NO: 48 samples" in capsys.readouterr().out
