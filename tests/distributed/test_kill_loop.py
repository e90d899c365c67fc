"""Fault 17: a run that is killed again and again ends where the clean run ends, to the last bit of its weights."""

from __future__ import annotations

import random
import re
import time
from pathlib import Path

import pytest

from tests.faults import BOUND_S, assert_resumes, train_rank, whole_checkpoints, with_dropout
from tests.ranks import Ranks, started_ranks, train
from trainer.errors import EXIT_FINISHED

STEPS, KILLS, SAVE_EVERY = 200, 20, 5
KILLS_AT_START = 4
"""So many of them strike before the first step, wherever the start is then.

While process groups are made, the other rank waits for the one that is gone as long as a start may take: there the
launcher ends it.
"""
LAST_TARGET = STEPS - 20
"""So that no run ends before the kill."""


@pytest.mark.timeout(290)
def test_fault_17_twenty_kills_at_random_moments_leave_the_weights_of_the_clean_run(
    workspace: Path, tmp_path: Path
) -> None:
    sections = {"train": {"steps": STEPS}, "checkpoint": {"every_steps": SAVE_EVERY, "keep_last": 2}}
    clean = with_dropout(workspace, tmp_path / "clean", **sections)
    assert train(clean, 2) == EXIT_FINISHED
    config = with_dropout(workspace, tmp_path / "run", **sections)
    seed = random.randrange(1 << 32)
    generator = random.Random(seed)
    targets = [0] * KILLS_AT_START + generator.sample(range(1, LAST_TARGET), KILLS - KILLS_AT_START)
    generator.shuffle(targets)
    aims, landed, reached = iter(sorted(filter(None, targets))), [], 0
    for target in (next(aims) if target else None for target in targets):
        with started_ranks(train_rank, 2, config, "auto", ()) as ranks:
            if target is None:
                time.sleep(generator.uniform(0.0, 2.0))
            else:
                wait_for_step(ranks, target)
                time.sleep(generator.uniform(0.0, 0.05))
            rank = generator.randrange(2)
            ranks.processes[rank].kill()
            codes = ranks.end_as_the_launcher_does() if target is None else ranks.wait(BOUND_S)
            landed.append(f"rank {rank} {f'after step {step}' if (step := last_step(ranks)) else 'at the start'}")
        assert codes[rank] < 0 != codes[1 - rank], f"seed {seed}: {codes}, after {landed}"
        found = [0, *reversed(whole_checkpoints(tmp_path / "run"))][-1]
        assert found >= reached, f"seed {seed}: a checkpoint is gone, after {landed}"
        reached = found
    print(f"seed {seed}; killed {', '.join(landed)}")
    assert len(landed) == KILLS
    assert_resumes(config, clean, f"resuming from step-{reached:08d}")


def last_step(ranks: Ranks) -> int:
    """The last step that rank 0 has printed since it was started; 0 before the first."""
    steps = re.findall(rf"^step (\d+)/{STEPS} ", ranks.output(), re.MULTILINE)
    return int(steps[-1]) if steps else 0


def wait_for_step(ranks: Ranks, step: int) -> None:
    while last_step(ranks) < step:
        assert all(process.exitcode is None for process in ranks.processes), ranks.output()
        time.sleep(0.005)
