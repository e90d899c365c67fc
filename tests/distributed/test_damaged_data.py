"""Damaged or exchanged data: every rank stops alike, the place is named, and nothing that was trained is lost."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ranks import losses, metrics, run_ranks, tiny_config, train
from tests.unit.data.test_shards import flip, write_data_set
from trainer.config import Config
from trainer.data.manifest import SUM_BYTES, ShardEntry, read_data_manifest
from trainer.data.order.sample_order import rank_share
from trainer.errors import EXIT_DAMAGED, EXIT_FINISHED, EXIT_USER_MISTAKE
from trainer.inputs.inputs import open_inputs

GLOBAL_SIZE, PAYLOAD = 8, 30
STEPS = 12


@pytest.fixture
def data(workspace: Path, tmp_path: Path) -> Path:
    """Two shards of 1.2 MiB of random tokens under the workspace's tokenizer."""
    folder = tmp_path / "data"
    generator = np.random.default_rng(0)
    write_data_set(folder, [[generator.integers(5, 500, 9999).tolist() for _ in range(63)] for _ in range(2)])
    prepared = read_data_manifest(workspace / "data" / "train")
    manifest = replace(
        read_data_manifest(folder), tokenizer_sha256=prepared.tokenizer_sha256, vocabulary_size=prepared.vocabulary_size
    )
    (folder / "manifest.json").write_text(manifest.to_json())
    return folder


def config_of(workspace: Path, folder: Path, run_dir: Path, seed: int = 3, **sections: Any) -> Config:
    settings = {"train": str(folder), "workers": 1, **sections.pop("data", {})}
    run = {"dir": str(run_dir), "seed": seed}
    return tiny_config(workspace, run_dir, data=settings, run=run, train={"steps": STEPS}, **sections)


def longer(config: Config) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update={"steps": STEPS + 1})})


def first_sample_in(config: Config, shard: int, mebibyte: int) -> int:
    """The first sample whose block lies in a MiB of a shard."""
    inputs = open_inputs(config, 2)
    first = shard * inputs.sources[0].manifest.shards[0].tokens + mebibyte * SUM_BYTES // 2
    last = min(first + SUM_BYTES // 2, (shard + 1) * inputs.sources[0].manifest.shards[0].tokens)
    blocks = inputs.order.locate(np.arange(STEPS * GLOBAL_SIZE))[1] * PAYLOAD
    inside = np.flatnonzero((blocks + PAYLOAD > first) & (blocks < last))
    return int(inside[0]) if len(inside) else -1


def test_a_flipped_bit_stops_all_ranks_with_its_place_and_the_run_goes_on_from_there_once_it_is_mended(
    workspace: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    seed = next(
        seed
        for seed in range(100)
        if 2 * GLOBAL_SIZE
        <= first_sample_in(config_of(workspace, data, tmp_path / "x", seed), 1, 1)
        < (STEPS - 2) * GLOBAL_SIZE
    )
    clean = config_of(workspace, data, tmp_path / "clean", seed)
    assert train(clean, 2) == EXIT_FINISHED
    sample = first_sample_in(clean, 1, 1)
    step, place = divmod(sample, GLOBAL_SIZE)
    batch = np.arange(step * GLOBAL_SIZE, (step + 1) * GLOBAL_SIZE)
    sources, blocks = open_inputs(clean, 2).order.locate(batch)
    rank = next(rank for rank in range(2) if place in rank_share(batch, sources, blocks, rank, 2))

    path = data / "shard-00001.tok"
    flip(path, SUM_BYTES + 99, 5)
    run_dir = tmp_path / "run"
    config = config_of(workspace, data, run_dir, seed)
    capfd.readouterr()
    assert run_ranks(_train, 2, config) == [EXIT_DAMAGED, EXIT_DAMAGED]
    printed = capfd.readouterr().out
    end = path.stat().st_size
    for reporter in range(2):
        assert (
            f"rank {reporter}: MiB 1 of shard-00001.tok (bytes 1,048,576..{end:,}) differs from its sum. "
            f"[{path} (rank {rank})]"
        ) in printed
    assert metrics(run_dir)[-1]["step"] == step
    assert [folder.name for folder in (run_dir / "checkpoints").glob("step-*")] == [f"step-{step:08d}"]

    flip(path, SUM_BYTES + 99, 5)
    assert train(config, 2) == EXIT_FINISHED
    assert losses(run_dir) == losses(tmp_path / "clean")


def _train(config: Config) -> int:
    from trainer.train import run

    return run(config)


def test_a_quarantine_steps_over_the_damage_and_is_part_of_what_a_run_is(
    workspace: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for place in (5, SUM_BYTES - 1):
        flip(data / "shard-00000.tok", place, 1)
    source = {"path": str(data), "quarantine": ["shard-00000:0"]}
    assert train(config_of(workspace, data, tmp_path / "run", data={"train": [source]}), 2) == EXIT_FINISHED
    assert train(longer(config_of(workspace, data, tmp_path / "run")), 2) == EXIT_USER_MISTAKE
    assert "source 'data' is another (quarantine was ['shard-00000:0'], now empty)" in capfd.readouterr().out


def test_damaged_validation_data_stops_all_ranks(workspace: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "validation")
    for shard in range(2):
        for place in (7, SUM_BYTES + 7):
            flip(tmp_path / "validation" / f"shard-{shard:05d}.tok", place, 1)
    config = config_of(
        workspace,
        data,
        tmp_path / "run",
        data={"validation": str(tmp_path / "validation")},
        eval={"every_steps": 5, "samples": 9},
    )
    assert run_ranks(_train, 2, config) == [EXIT_DAMAGED, EXIT_DAMAGED]


def _swap(folder: Path) -> None:
    """Shards exchanged, manifest and all: a data set that is whole, but another."""
    manifest = read_data_manifest(folder)
    _write(folder, manifest.shards[::-1])


def _rename(folder: Path) -> None:
    for path in folder.glob("shard-00001.*"):
        path.rename(folder / f"other{path.suffix}")
    first, second = read_data_manifest(folder).shards
    _write(folder, (first, replace(second, name="other")))


def _change(folder: Path) -> None:
    write_data_set(folder / "new", [[[7] * 9998 + [8]] * 63])
    for suffix in ("tok", "doc", "sum"):
        (folder / "new" / f"shard-00000.{suffix}").replace(folder / f"shard-00001.{suffix}")
    new = read_data_manifest(folder / "new").shards[0]
    _write(folder, (read_data_manifest(folder).shards[0], replace(new, name="shard-00001")))


def _add(folder: Path) -> None:
    shards = read_data_manifest(folder).shards
    for suffix in ("tok", "doc", "sum"):
        shutil.copyfile(folder / f"shard-00000.{suffix}", folder / f"shard-00002.{suffix}")
    _write(folder, (*shards, replace(shards[0], name="shard-00002")))


def _write(folder: Path, shards: tuple[ShardEntry, ...]) -> None:
    totals = {name: sum(getattr(entry, name) for entry in shards) for name in ("tokens", "documents")}
    manifest = replace(read_data_manifest(folder), shards=shards, **totals)
    (folder / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")


def test_a_resume_on_other_shards_is_refused_with_the_difference(
    workspace: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = config_of(workspace, data, tmp_path / "run")
    assert train(config) == EXIT_FINISHED
    data.rename(tmp_path / "original")
    for change, words in (
        (_swap, "its shards are in another order"),
        (_rename, "renamed: shard-00001 to other"),
        (_change, "changed: shard-00001"),
        (_add, "added: shard-00002"),
    ):
        shutil.rmtree(data, ignore_errors=True)
        shutil.copytree(tmp_path / "original", data)
        change(data)
        assert train(longer(config)) == EXIT_USER_MISTAKE
        assert f"source 'data' is another ({words})" in capfd.readouterr().out
