"""A kill while a checkpoint is converted, or brought into another layout, costs that attempt and no more."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import AutoModelForMaskedLM

from tests.elastic_matrix import SAVED_STEP, Layout, difference, layout_config
from tests.fault_points import Fault, Point, die_in_the_file, inject, kill
from tests.faults import train_with, whole_checkpoints
from tests.ranks import losses, metrics, started_ranks, train
from trainer.config import Config
from trainer.errors import EXIT_FINISHED

BEFORE, AFTER = Layout(ranks=2, stage=1), Layout(ranks=3, stage=3)


@pytest.fixture(scope="module")
def trained(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """15 steps on 2 ranks at ZeRO stage 1, with checkpoints at 5, 10 and 15."""
    config = layout_config(workspace, tmp_path_factory.mktemp("trained"), BEFORE)
    assert train(config, BEFORE.ranks) == EXIT_FINISHED
    return config


TEMPORARY: tuple[str, str] = ("mkdir", r"/\.model\.tmp-[^/]*$")
CONVERSIONS: dict[str, tuple[Point, object]] = {
    "before its first file": ((TEMPORARY, ("write", r"/\.model\.tmp-")), kill),
    "in its weights": ((TEMPORARY,), die_in_the_file),
    "before the rename": ((TEMPORARY, ("rename", r" -> .*/model$")), kill),
}


def convert_rank(run_dir: Path, output: Path, faults: Sequence[Fault]) -> int:
    """Runs in a process of its own."""
    from launcher.console import make_console
    from tools.convert import convert

    inject(faults)
    convert(str(run_dir), str(output), "float32", "5GB", make_console())
    return 0


def convert_with(run_dir: Path, output: Path, *faults: Fault) -> int:
    with started_ranks(convert_rank, 1, run_dir, output, faults) as process:
        return process.wait()[0]


@pytest.mark.parametrize("moment", CONVERSIONS)
def test_a_killed_conversion_leaves_no_output_and_the_next_one_cleans_up(
    moment: str, trained: Config, tmp_path: Path
) -> None:
    point, action = CONVERSIONS[moment]
    run_dir, output = Path(trained.run.dir), tmp_path / "model"
    assert convert_with(run_dir, output, Fault(0, point, action)) < 0  # type: ignore[arg-type]
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".model.tmp-"), "no output"
    names = {path.name for path in left.iterdir()}
    if moment == "before its first file":
        assert not names
    elif moment == "in its weights":
        assert "config.json" in names and "model.safetensors" not in names, (
            "they have another name until they are whole"
        )
        assert len(names) == 2
    else:
        assert {"model.safetensors", "tokenizer.json", "README.md"} <= names
    assert whole_checkpoints(run_dir) == [15, 10, 5]
    assert convert_with(run_dir, output) == 0
    assert list(tmp_path.iterdir()) == [output], "what the killed one left is gone"
    AutoModelForMaskedLM.from_pretrained(output)


RESTORING: Point = (("list", r"checkpoints/step-\d+$"), ("read", r"_optim_states\.pt$"))  # hashing lists no folder


@pytest.mark.parametrize("rank", [0, 2])
def test_a_kill_while_another_layout_is_restored_changes_nothing(
    rank: int, trained: Config, workspace: Path, tmp_path: Path
) -> None:
    name = f"checkpoints/step-{SAVED_STEP:08d}"
    shutil.copytree(Path(trained.run.dir) / name, tmp_path / name)
    before = {path: path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file()}
    config = layout_config(workspace, tmp_path, AFTER)
    outcome = train_with(config, Fault(rank, RESTORING, kill), world_size=AFTER.ranks)
    assert outcome.codes.pop(rank) < 0 < min(outcome.codes)
    assert "resuming in another layout" in outcome.output and "step 6/" not in outcome.output
    assert {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()} == before
    outcome = train_with(config, world_size=AFTER.ranks)
    assert outcome.codes == [EXIT_FINISHED] * AFTER.ranks
    resumed = [line["train/loss"] for line in metrics(tmp_path) if "train/loss" in line]
    assert difference(resumed, losses(Path(trained.run.dir))) <= 1e-5
