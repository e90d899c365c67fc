"""The benchmarks: what is timed is the real thing, and what is said of it is right."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from rich.console import Console

from tests.commands import assert_one_card, call_forked, maskwright
from tests.process.bench_variants import spin
from tools.bench import loader as bench_loader
from tools.bench.common import (
    BenchReport,
    Measurement,
    Ratio,
    Variant,
    for_seconds,
    in_own_process,
    measure,
    run_benchmark,
)
from tools.bench.loader_peers import _mosaic_lacking
from tools.bench.loader_work import LoaderBenchmark
from tools.bench.prepare import SEQ_LEN, PrepareBenchmark, bench_prepare, group_blocks
from tools.bench.synthetic import make_tokenizer, write_random_shards
from trainer.data.dataset import ShardSet
from trainer.data.shard_checks import verify_shard
from trainer.errors import MaskwrightError, UserError

VARIANTS = "tests.process.bench_variants"


def quiet() -> Console:
    return Console(file=io.StringIO())


def report_of(measurements: dict[str, list[Measurement]], ratios: list[Ratio]) -> BenchReport:
    variants = [Variant(name, f"what {name} is", lambda: Measurement(0, 0, 0)) for name in measurements]
    machine = {"cpu": "a CPU", "cores": 2, "memory_bytes": 2**34, "load_average": 0.5, "python": "3", "versions": {}}
    return BenchReport("test", {"size": 3}, machine, variants, measurements, ratios, ["a note"])


def test_cpu_time_counts_work_and_not_waiting():
    waited = measure(lambda: time.sleep(0.3) or 1)
    assert waited.wall_seconds >= 0.3 and waited.cpu_seconds < 0.15
    worked = measure(lambda: spin(0.2))
    assert worked.tokens == 7 and 0.2 <= worked.cpu_seconds <= worked.wall_seconds + 0.05


def test_cpu_time_counts_finished_children():
    def child() -> int:
        process = os.fork()
        if not process:
            spin(0.2)
            os._exit(0)
        os.waitpid(process, 0)
        return 1

    assert measure(child).cpu_seconds >= 0.19


def test_a_repetition_lasts_its_time_and_does_not_count_the_first_call():
    ends: list[float] = []

    def step() -> int:
        time.sleep(0.01 if ends else 0.5)
        ends.append(time.perf_counter())
        return 3

    measured = for_seconds(0.1, step)()
    assert 0.1 <= measured.wall_seconds <= time.perf_counter() - ends[0]
    assert measured.tokens == 3 * (len(ends) - 1)


def test_variants_take_turns():
    turns: list[str] = []

    def variant(name: str) -> Variant:
        return Variant(name, "", lambda: turns.append(name) or Measurement(len(turns), 1.0, 1.0))

    report = run_benchmark("test", {}, [variant("a"), variant("b")], [], [], 3, quiet())
    assert turns == ["a", "b"] * 3
    assert [measured.tokens for measured in report.measurements["b"]] == [2, 4, 6]


def test_a_report_has_medians_spread_and_ratios_of_rounds():
    fast = [Measurement(tokens, 2.0, 1.0) for tokens in (8_000_000, 30_000_000, 10_000_000)]
    slow = [Measurement(tokens, 1.0, 1.0) for tokens in (2_000_000, 3_000_000, 5_000_000)]
    ratios = [Ratio("fast", "slow"), Ratio("fast", "slow", "wall")]
    report = report_of({"fast": fast, "slow": slow}, ratios)
    facts = json.loads(report.to_json())
    assert facts["variants"][0]["tokens_per_cpu_second"] == {"median": 10e6, "lowest": 8e6, "highest": 30e6}
    assert facts["variants"][0]["tokens_per_second"]["median"] == 5e6
    assert [ratio["median"] for ratio in facts["ratios"]] == [4.0, 2.0]  # of 4, 10, 2: not of the medians
    assert facts["settings"] == {"size": 3} and facts["notes"] == ["a note"]
    stream = io.StringIO()
    report.print(Console(file=stream, width=120))
    text = stream.getvalue()
    assert "fast over slow, a core: 4.00 × (2.00–10.00)" in text and "by the clock: 2.00 ×" in text
    for words in ("8.00–30.0", "what slow is", "load average 0.50", "Note: a note"):
        assert words in text


def test_a_variant_in_its_own_process():
    measured = in_own_process(f"{VARIANTS}:spin_in_own_process", {"seconds": 0.1})
    assert measured.tokens == 7 and 0.1 <= measured.cpu_seconds < 1.0  # imports are not timed
    with pytest.raises(MaskwrightError, match=r"fail_in_own_process(?s:.*)no such thing"):
        in_own_process(f"{VARIANTS}:fail_in_own_process", {})


def test_random_shards_are_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tools.bench.synthetic.SHARD_BYTES", 300_000)
    write_random_shards(tmp_path, 1_000_000, 5000)
    shards = ShardSet(tmp_path)
    assert 900_000 < shards.tokens * 2 <= 1_000_000 and len(shards.manifest.shards) > 2
    assert all(not verify_shard(tmp_path, entry) for entry in shards.manifest.shards)
    tokens = np.concatenate([np.fromfile(path, shards.dtype) for path in tmp_path.glob("*.tok")])
    assert tokens.max() < 5000 and (tokens == 2).sum() == shards.manifest.documents
    tokenizer = make_tokenizer(5000)
    assert len(tokenizer) == 5000 and (tokenizer.sep_token_id, tokenizer.mask_token_id) == (2, 4)


@pytest.mark.parametrize(("data", "scheme"), [(None, "token"), ("DATA", "token"), (None, "span")])
def test_bench_loader(data: str | None, scheme: Literal["token", "span"], workspace: Path):
    settings = LoaderBenchmark(
        data=data and str(workspace / "data"),
        size_megabytes=1,
        seq_len=64,
        micro_size=8,
        against="hf",
        rounds=2,
        seconds=0.05,
        scheme=scheme,
    )
    report = bench_loader.bench_loader(settings, quiet())
    single = ["token masks", "token end to end"] if scheme != "token" else []
    theirs = ["hf masks", "hf rows", "hf tensor rows", "hf whole tensors"]
    names = ["order", "gather", "masks", "end to end", *single, *theirs]
    assert [variant.name for variant in report.variants] == names
    assert all(len(report.measurements[name]) == 2 for name in names)
    assert all(row.tokens > 0 and row.cpu_seconds > 0 for rows in report.measurements.values() for row in rows)
    assert report.ratio(Ratio("end to end", "hf rows")).median > 2  # 20 is the aim, on larger batches
    assert report.figure("order").median > report.figure("end to end").median
    if single:
        assert all(Ratio(part, f"token {part}") in report.ratios for part in ("masks", "end to end"))
    assert report.settings["data"] == settings.data and report.settings["blocks"] > 8


def test_bench_loader_needs_a_batch(workspace: Path):
    data = str(workspace / "data" / "validation")
    with pytest.raises(UserError, match="not one batch of 4096"):
        bench_loader.bench_loader(LoaderBenchmark(data=data, micro_size=4096, against="none"), quiet())


@pytest.mark.skipif(not _mosaic_lacking(), reason="mosaicml-streaming is installed: its absence cannot be shown")
def test_bench_loader_without_mosaicml_streaming():
    wanted = ("bench", "loader", "--size", "1", "--seq-len", "64", "--rounds", "1", "--seconds", "0.02")
    assert_one_card(maskwright(*wanted, "--against", "mds"), 2, "mosaicml-streaming is not installed", "--against mds")
    left_out = maskwright(*wanted, "--json")
    assert left_out.returncode == 0, left_out.stderr
    facts = json.loads(left_out.stdout)
    assert any("mosaicml-streaming is not installed. It is left out." in note for note in facts["notes"])
    assert "hf rows" in [variant["name"] for variant in facts["variants"]]


def measure_prepare(settings: PrepareBenchmark) -> tuple[list[int], Sequence[Ratio]]:
    """Runs in a process of its own: the tokens of each variant, and the ratios."""
    report = bench_prepare(settings, quiet())
    names = ["bare tokenizer", "prepare, 1 worker", "prepare, 2 workers", "hf map"]
    assert [variant.name for variant in report.variants] == names
    return [report.measurements[name][0].tokens for name in names], report.ratios


def test_bench_prepare(workspace: Path):
    settings = PrepareBenchmark((str(workspace / "text.txt"),), str(workspace / "tokenizer"), rounds=1)
    tokens, ratios = call_forked(measure_prepare, settings)
    assert len(set(tokens[:3])) == 1 and tokens[0] > 10_000
    assert abs(tokens[3] - tokens[0]) <= 1  # datasets leaves the line end of a file in its last paragraph
    assert [(ratio.name, ratio.over, ratio.by) for ratio in ratios] == [
        ("prepare, 1 worker", "bare tokenizer", "cpu"),
        ("prepare, 2 workers", "prepare, 1 worker", "wall"),
        ("prepare, 1 worker", "hf map", "cpu"),
    ]


def test_bench_prepare_refuses_what_both_sides_cannot_read(tmp_path: Path):
    (tmp_path / "a.txt.zst").write_bytes(b"x")
    with pytest.raises(UserError, match="cannot be read by both sides"):
        bench_prepare(PrepareBenchmark((str(tmp_path / "a.txt.zst"),)), quiet())


def test_blocks_are_cut_from_lists_put_end_to_end():
    lists = [list(range(300)), [], list(range(300, 1100))]
    blocks = group_blocks({"input_ids": lists, "special_tokens_mask": lists})
    assert blocks["input_ids"] == [list(range(SEQ_LEN)), list(range(SEQ_LEN, 2 * SEQ_LEN))]
    assert blocks["special_tokens_mask"] == blocks["input_ids"]
