"""A mixture whose weights change, over a resume and a change of the global batch: every block once, the same losses."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.ranks import losses, metrics, run_ranks, tiny_config, train
from trainer.config import Config
from trainer.data.loader import SampledBlocks
from trainer.errors import EXIT_FINISHED, EXIT_USER_MISTAKE
from trainer.inputs.inputs import open_inputs

CHANGE_AT = 85  # samples: within step 11 of 8 samples, and within a mixture block of 16
STOP_AT = 10  # steps


def mixed(workspace: Path, run_dir: Path, **sections: Any) -> Config:
    data = {
        "train": [
            {"path": str(workspace / "data" / "train"), "name": "large", "weight": 1},
            {"path": str(workspace / "data" / "validation"), "name": "small", "weight": 1},
        ],
        "stages": [{"from_tokens": (CHANGE_AT - 1) * 32 + 1, "weights": {"large": 1, "small": 3}}],
        "mixture_block": 16,
    }
    defaults = {"checkpoint": {"every_steps": STOP_AT, "keep_last": 9}, "schedule": {"name": "constant"}}
    return tiny_config(workspace, run_dir, **{**defaults, **sections, "data": {**data, **sections.get("data", {})}})


def train_and_record(config: Config, resume: str, record: str) -> int:
    """Train, and note in a file of this rank every (sample, source, block) that becomes part of a batch."""
    from trainer.train import run

    make = SampledBlocks.__getitems__

    def recording(self: SampledBlocks, places: np.ndarray) -> Any:
        with open(f"{record}-{os.environ['RANK']}", "a") as file:
            file.writelines(f"{sample} {source} {block}\n" for sample, source, block in places.tolist())
        return make(self, places)

    SampledBlocks.__getitems__ = recording
    return run(config, resume)


def record_run(config: Config, folder: Path) -> list[tuple[int, ...]]:
    """Train on two ranks; the (sample, source, block) of all batches."""
    folder.mkdir()
    assert run_ranks(train_and_record, 2, config, "auto", str(folder / "places")) == [EXIT_FINISHED] * 2
    lines = [line for path in folder.iterdir() for line in path.read_text().splitlines()]
    return [tuple(map(int, line.split())) for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert train(mixed(workspace, run_dir), 2) == EXIT_FINISHED
    return run_dir


def test_a_resume_before_the_change_goes_on_bit_for_bit(uninterrupted: Path, workspace: Path, tmp_path: Path):
    checkpoint = uninterrupted / "checkpoints" / f"step-{STOP_AT:08d}"
    assert train(mixed(workspace, tmp_path / "run"), 2, resume=str(checkpoint)) == EXIT_FINISHED
    found = {line["step"]: line["train/loss"] for line in metrics(tmp_path / "run")}
    assert min(found) == STOP_AT + 1
    assert [found[step] for step in range(STOP_AT + 1, 21)] == losses(uninterrupted)[STOP_AT:]


def test_every_block_once_a_source_and_epoch_over_a_resume_with_another_global_batch(workspace: Path, tmp_path: Path):
    """160 samples: 10 steps of 8, then 5 of 16, the weights changing on the way; the small source begins anew."""
    first = mixed(workspace, tmp_path / "run", train={"steps": STOP_AT})
    second = mixed(workspace, tmp_path / "run", train={"steps": 15}, batch={"global_size": 16, "micro_size": 4})
    reads = record_run(first, tmp_path / "first") + record_run(second, tmp_path / "second")
    assert [line["samples"] for line in metrics(tmp_path / "run")] == [*range(8, 81, 8), *range(96, 161, 16)]

    order = open_inputs(second, 2).order
    assert order.orders[0].spans[-1].start == CHANGE_AT
    assert sorted(sample for sample, _, _ in reads) == list(range(160))
    assert order.epochs(160)[1] > 1, "the small source begins anew"
    for number, visits in enumerate(order.orders[0].visits(160)):
        times = Counter(block for _, source, block in reads if source == number)
        whole, begun = divmod(visits, order.orders[0].blocks[number])
        counts = Counter(times[block] for block in range(order.orders[0].blocks[number]))
        assert counts == +Counter({whole: order.orders[0].blocks[number] - begun, whole + 1: begun})

    values = metrics(tmp_path / "run")[-1]
    for number, name in enumerate(("large", "small")):
        visits = order.orders[0].visits(160)[number]
        assert values[f"source/{name}/tokens"] == visits * 32
        assert values[f"source/{name}/epochs"] == visits / order.orders[0].blocks[number]


def test_the_losses_of_the_sources_make_up_the_loss(uninterrupted: Path, workspace: Path):
    order = open_inputs(mixed(workspace, uninterrupted), 2).order
    for line in metrics(uninterrupted):
        sources, _ = order.locate(np.arange(line["samples"] - 8, line["samples"]))
        shares = np.bincount(sources, minlength=2) / 8
        parts = [line["source/large/loss"], line["source/small/loss"]]
        together = sum(share * (part or 0.0) for share, part in zip(shares, parts, strict=True))
        assert together == pytest.approx(line["train/loss"], abs=1e-6)
        assert all((part is None) == (share == 0) for share, part in zip(shares, parts, strict=True))


def test_weights_are_added_for_what_lies_ahead_and_refused_for_the_past(
    workspace: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    run_dir = tmp_path / "run"
    assert train(mixed(workspace, run_dir, train={"steps": STOP_AT}, data={"stages": []})) == EXIT_FINISHED
    frozen = (run_dir / "data_order.json").read_text()
    weights = {"large": 0, "small": 1}
    past = mixed(workspace, run_dir, data={"stages": [{"from_tokens": 70 * 32, "weights": weights}]})
    assert train(past) == EXIT_USER_MISTAKE
    assert "other weights can begin at token 2,560 at the earliest (data.stages, data.phases)" in capfd.readouterr().out
    assert (run_dir / "data_order.json").read_text() == frozen
    ahead = mixed(workspace, run_dir, data={"stages": [{"from_tokens": 80 * 32, "weights": weights}]})
    assert train(ahead) == EXIT_FINISHED
    lines = metrics(run_dir)
    assert [line["source/large/tokens"] for line in lines[-3:]] == [lines[STOP_AT - 1]["source/large/tokens"]] * 3
    assert yaml.safe_load((run_dir / "data_order.json").read_text())["phases"][0]["spans"][-1][0] == 80


def test_a_source_that_is_seen_too_often_is_refused_with_the_numbers(workspace: Path, tmp_path: Path):
    from trainer.errors import UserError

    sources = [
        {"path": str(workspace / "data" / "train"), "name": "large", "weight": 1},
        {"path": str(workspace / "data" / "validation"), "name": "small", "weight": 1, "max_epochs": 1.5},
    ]
    config = mixed(workspace, tmp_path, data={"train": sources, "stages": []}, train={"steps": 400})
    with pytest.raises(UserError, match=r"'small' \(\d+ blocks\) \d+\.\d\d times, at most 1\.5 are allowed") as caught:
        open_inputs(config, 1)
    assert caught.value.where == "data.train[1].max_epochs"


def test_temperature_weighs_by_size(workspace: Path, tmp_path: Path):
    sources = [
        {"path": str(workspace / "data" / "train"), "name": "large"},
        {"path": str(workspace / "data" / "validation"), "name": "small"},
    ]

    def places(temperature: float) -> tuple[int, ...]:
        data = {"train": sources, "stages": [], "temperature": temperature, "mixture_block": 10_000}
        return open_inputs(mixed(workspace, tmp_path, data=data), 1).order.orders[0].spans[0].places

    large, small = (source.tokens for source in open_inputs(mixed(workspace, tmp_path), 1).sources)
    assert places(1.0)[1] == round(10_000 * small / (large + small))
    assert places(2.0)[1] == round(10_000 * small**0.5 / (large**0.5 + small**0.5))
    assert places(1000.0)[1] == pytest.approx(5000, abs=10)
