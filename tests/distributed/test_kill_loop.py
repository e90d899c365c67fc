"""A run that is killed again and again ends where the clean run ends, to the last bit of its weights."""

from __future__ import annotations

import random
import re
import time
from pathlib import Path

import pytest

from tests.faults import assert_resumes, train_rank, whole_checkpoints, with_dropout
from tests.gate import Gate, wait_at_the_gate
from tests.ranks import Ranks, started_ranks, train
from tests.waiting import wait_for
from trainer.config import Config
from trainer.errors import EXIT_FINISHED

STEPS, KILLS, SAVE_EVERY = 60, 20, 5
KILLS_AT_START = 4
"""So many of them strike before the first step, wherever the start is then.

While process groups are made, the other rank waits for the one that is gone as long as a start may take: there the
launcher ends it.
"""
LAST_TARGET = STEPS - 20


@pytest.mark.timeout(3600)
def test_twenty_kills_at_random_moments_leave_the_weights_of_the_clean_run(workspace: Path, tmp_path: Path) -> None:
    sections = {"train": {"steps": STEPS}, "checkpoint": {"every_steps": SAVE_EVERY, "keep_last": 2}}
    clean = with_dropout(workspace, tmp_path / "clean", **sections)
    assert train(clean, 2) == EXIT_FINISHED
    config = with_dropout(workspace, tmp_path / "run", **sections)
    seed = random.randrange(1 << 32)
    generator = random.Random(seed)
    targets = [0] * KILLS_AT_START + generator.sample(range(1, LAST_TARGET), KILLS - KILLS_AT_START)
    generator.shuffle(targets)
    aims, landed, reached = iter(sorted(filter(None, targets))), [], 0
    gate = Gate(tmp_path)
    gate.close_after(STEPS - 1)  # no run ends before the kill
    for target in (next(aims) if target else None for target in targets):
        with started_ranks(train_at_a_gate, 2, gate.path, config) as ranks:
            if target is None:
                time.sleep(generator.uniform(0.0, 2.0))
            else:
                wait_for_step(ranks, target)
                time.sleep(generator.uniform(0.0, 0.05))
            rank = generator.randrange(2)
            ranks.processes[rank].kill()
            gate.open()
            codes = ranks.end_as_the_launcher_does() if target is None else ranks.wait()
            landed.append(f"rank {rank} {f'after step {step}' if (step := last_step(ranks)) else 'at the start'}")
        gate.close_after(STEPS - 1)
        assert codes[rank] < 0 != codes[1 - rank], f"seed {seed}: {codes}, after {landed}"
        found = [0, *reversed(whole_checkpoints(tmp_path / "run"))][-1]
        assert found >= reached, f"seed {seed}: a checkpoint is gone, after {landed}"
        reached = found
    gate.open()
    print(f"seed {seed}; killed {', '.join(landed)}")
    assert len(landed) == KILLS
    assert_resumes(config, clean, f"resuming from step-{reached:08d}")


def train_at_a_gate(gate: Path, config: Config) -> int:
    """Runs on each rank."""
    wait_at_the_gate(gate)
    return train_rank(config, "auto", ())


def last_step(ranks: Ranks) -> int:
    """The last step that rank 0 has printed since it was started; 0 before the first."""
    steps = re.findall(rf"^step (\d+)/{STEPS} ", ranks.output(), re.MULTILINE)
    return int(steps[-1]) if steps else 0


def wait_for_step(ranks: Ranks, step: int) -> None:
    def reached() -> bool:
        assert all(process.exitcode is None for process in ranks.processes), ranks.output()
        return last_step(ranks) >= step

    wait_for(reached, f"step {step}", poll_s=0.005)
