"""Save under one layout, resume under another, compare losses: for tests, and as a table for the documentation.

`python -m tests.elastic_matrix > docs/resume-matrix.md` runs every pair of the twelve layouts, in about ten minutes.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.ranks import TWO_LAYERS, losses, run_ranks, tiny_config
from trainer.config import Config
from trainer.errors import EXIT_FINISHED, EXIT_STOPPED_AFTER_SAVING
from trainer.runtime.signals import StopRequest
from trainer.tracking.jsonl import read_metrics

SAVED_STEP, LAST_STEP = 5, 15


class Layout(NamedTuple):
    ranks: int
    stage: int

    def __str__(self) -> str:
        return f"{self.ranks} × ZeRO-{self.stage}"


INTRODUCTION = f"""# Resuming in another layout

Made by `python -m tests.elastic_matrix > docs/resume-matrix.md`; `tests/distributed/test_elastic.py` runs a part of it,
and the same for bf16, fp16 and offload.

A run of {LAST_STEP} steps is saved at step {SAVED_STEP} by each row's layout and resumed from there by each column's,
with optimizer state, in fp32 without dropout, on CPU over gloo. Each cell is the largest difference of the losses of
the next {LAST_STEP - SAVED_STEP} steps from those of a run on one rank at stage 1 that was not interrupted, in nats.
The bound is 1e-5; what there is comes from sums in another order.

"""
REFERENCE = Layout(1, 1)
"""The run that is not interrupted."""
LAYOUTS = tuple(Layout(ranks, stage) for ranks in (1, 2, 3) for stage in (0, 1, 2, 3))


def layout_config(workspace: Path, run_dir: Path, layout: Layout, **sections: Any) -> Config:
    """15 steps that save at the fifth; 12 sequences a step divide among 1, 2 and 3 ranks."""
    return tiny_config(
        workspace,
        run_dir,
        **{
            "deepspeed": f"zero{layout.stage}",
            "model": {"overrides": TWO_LAYERS},
            "batch": {"global_size": 12, "micro_size": 2},
            "train": {"steps": LAST_STEP},
            "checkpoint": {"every_steps": SAVED_STEP, "keep_last": 9},
            **sections,
        },
    )


def save_all(configs: dict[Layout, Config]) -> list[float]:
    """Run each layout to the step that is saved, and REFERENCE to its end; returns the losses of that one."""
    for ranks, layouts in itertools.groupby(sorted(configs), key=lambda layout: layout.ranks):
        group = list(layouts)
        run_in_turn(ranks, [configs[layout] for layout in group], [layout != REFERENCE for layout in group])
    return losses(Path(configs[REFERENCE].run.dir))


def resume_all(
    saved: dict[Layout, Config], pairs: Iterable[tuple[Layout, Layout]], folder: Path, workspace: Path, **sections: Any
) -> dict[tuple[Layout, Layout], list[float]]:
    """Resume the checkpoint of each pair's first layout under its second; returns the losses after it."""
    configs: dict[tuple[Layout, Layout], Config] = {}
    for before, after in pairs:
        run_dir = folder / f"{before.ranks}-{before.stage}-{after.ranks}-{after.stage}"
        name = f"checkpoints/step-{SAVED_STEP:08d}"
        shutil.copytree(Path(saved[before].run.dir) / name, run_dir / name)
        configs[before, after] = layout_config(workspace, run_dir, after, **sections)
    by_ranks = sorted(configs, key=lambda pair: pair[1].ranks)
    for ranks, group in itertools.groupby(by_ranks, key=lambda pair: pair[1].ranks):
        run_in_turn(ranks, [configs[pair] for pair in group])
    found = {}
    for pair, config in configs.items():
        lines = [line for line in read_metrics(Path(config.run.dir) / "metrics.jsonl") if "train/loss" in line]
        assert [line["step"] for line in lines] == list(range(SAVED_STEP + 1, (config.train.steps or 0) + 1))
        found[pair] = [line["train/loss"] for line in lines]
    return found


def run_in_turn(ranks: int, configs: Sequence[Config], stopped: Sequence[bool] = ()) -> None:
    """Train each config on so many ranks, one after the other; where it says so, no further than to its first save."""
    codes = run_ranks(_train_all, ranks, configs, stopped)
    assert codes == [EXIT_FINISHED] * ranks, codes


class _AfterTheSave(StopRequest):
    """A request to stop that comes when a checkpoint is there."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self._checkpoint = Path(config.run.dir) / f"checkpoints/step-{config.checkpoint.every_steps:08d}"

    @property
    def received(self) -> bool:
        return self._checkpoint.exists()


def _train_all(configs: Sequence[Config], stopped: Sequence[bool] = ()) -> int:
    """Runs on each rank: one process group for all runs, because to import and to start is most of a short run.

    Args:
        stopped: whether a run ends with the first step that is saved; none does by default.
    """
    from trainer.inputs.inputs import open_inputs
    from trainer.liveness.activity import Activity
    from trainer.run import Run
    from trainer.runtime import distributed
    from trainer.runtime.run_lock import RunLock
    from trainer.tracking.console import TrainingConsole
    from trainer.tracking.status import StatusWriter
    from trainer.train import _train

    world = distributed.start()
    for config, stops in itertools.zip_longest(configs, stopped, fillvalue=False):
        run_dir = Path(config.run.dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        run = Run(
            config=config,
            world=world,
            resume="auto",
            is_dry=False,
            stop=_AfterTheSave(config) if stops else StopRequest(),
            folder=run_dir,
            lock=RunLock(run_dir, print),  # not taken: nobody else trains here
            console=TrainingConsole(sys.stdout, is_silent=not world.is_main),
            status=StatusWriter(run_dir if world.is_main else None, ["here"], world.size),
            activity=Activity(),
        )
        code = _train(run, open_inputs(config, world.size, thorough=world.is_main))
        assert code == (EXIT_STOPPED_AFTER_SAVING if stops else EXIT_FINISHED), code
    distributed.stop()
    return EXIT_FINISHED


def reshape(checkpoint: Path, config: Config, ranks: int, target: Path) -> None:
    """Bring a checkpoint into an engine of `config` on `ranks` ranks, and save it from there without a step."""
    target.mkdir(parents=True)
    assert run_ranks(_reshape, ranks, checkpoint, config, target) == [0] * ranks


def _reshape(checkpoint: Path, config: Config, target: Path) -> int:
    """Runs on each rank."""
    from trainer.checkpoint.restore import restore
    from trainer.engine.engine import TrainingEngine
    from trainer.inputs.inputs import open_inputs
    from trainer.model.build import build_model
    from trainer.runtime import distributed

    world = distributed.start()
    inputs = open_inputs(config, world.size, thorough=world.is_main)
    built = build_model(config.model, inputs.vocabulary, config.data.seq_len, config.run.seed)
    engine = TrainingEngine(built, inputs.ds_config, config.optimizer, world)
    restore(engine, checkpoint, world)
    engine.capture(target, detached=False).write()
    distributed.stop()
    return 0


def table(found: dict[tuple[Layout, Layout], list[float]], reference: list[float]) -> str:
    """Markdown: the largest difference of a loss from the uninterrupted run's, saved (rows) by resumed (columns)."""
    lines = [
        "| saved \\ resumed | " + " | ".join(map(str, LAYOUTS)) + " |",
        "|---" * (len(LAYOUTS) + 1) + "|",
    ]
    for before in LAYOUTS:
        cells = [f"{difference(found[before, after], reference):.0e}" for after in LAYOUTS]
        lines.append(f"| **{before}** | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def difference(resumed: list[float], reference: list[float]) -> float:
    return max(abs(one - other) for one, other in zip(resumed, reference[SAVED_STEP:], strict=True))


def main() -> None:
    from tests.conftest import make_workspace

    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as scratch:
        workspace = Path(scratch) / "workspace"
        workspace.mkdir()
        with contextlib.redirect_stdout(sys.stderr):
            make_workspace(workspace)
        configs = {layout: layout_config(workspace, Path(scratch) / f"{layout}", layout) for layout in LAYOUTS}
        with contextlib.redirect_stdout(sys.stderr):
            reference = save_all(configs)
            found = resume_all(configs, itertools.product(LAYOUTS, LAYOUTS), Path(scratch) / "resumed", workspace)
        print(INTRODUCTION + table(found, reference))


if __name__ == "__main__":
    main()
