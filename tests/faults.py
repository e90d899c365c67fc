"""Run ranks into faults, and check what must hold after every one of them.

I1  the previous whole checkpoint still loads
I2  all ranks decide alike
I3  they end in bounded time, and no process is left
I4  the resumed run equals the uninterrupted one: bit for bit at the same number of ranks, to 1e-5 in loss at another
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.commands import start_maskwright
from tests.fault_points import Fault, inject
from tests.gate import Gate
from tests.ranks import losses, started_ranks, tiny_config
from tests.waiting import TIMEOUT_S, rank_processes, wait_for_step
from trainer.checkpoint.find import candidates
from trainer.checkpoint.manifest import find_faults
from trainer.checkpoint.zero_files import ZeroFiles
from trainer.config import Config
from trainer.errors import EXIT_FINISHED

MARKED = ("environ", "maps")
"""Where /proc shows the mark of a process that was executed, and of one that was forked."""
DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}


@dataclass(frozen=True)
class Outcome:
    codes: list[int]
    output: str


def with_dropout(workspace: Path, run_dir: Path, **sections: Any) -> Config:
    """`tiny_config` of a model with dropout, so that bit-equal means that its random state is equal as well."""
    base = tiny_config(workspace, run_dir)
    model = {"overrides": {**base.model.overrides, **DROPOUT}}
    return tiny_config(workspace, run_dir, **{"model": model, **sections})


def train_with(config: Config, *faults: Fault, world_size: int = 2, resume: str = "auto") -> Outcome:
    """Train on ranks that meet faults; they must end by themselves (I3)."""
    with started_ranks(train_rank, world_size, config, resume, faults) as ranks:
        codes = ranks.wait()
        return Outcome(codes, ranks.output())


def train_rank(config: Config, resume: str, faults: Sequence[Fault]) -> int:
    """Runs on each rank."""
    from trainer.train import run

    inject(faults)
    return run(config, resume)


def whole_checkpoints(run_dir: Path) -> list[int]:
    """Steps of the checkpoints, newest first; each folder of that name must be one, and whole."""
    found = candidates(run_dir)
    for candidate in found:
        assert candidate.manifest is not None, candidate.fault
        assert find_faults(candidate.folder, candidate.manifest) == []
    return [candidate.step for candidate in found]


def assert_resumes(config: Config, clean: Config, expected: str, world_size: int = 2) -> None:
    """I1 and I4: start again without faults, and end with the losses and the weights of the clean run."""
    run_dir, clean_dir = Path(config.run.dir), Path(clean.run.dir)
    outcome = train_with(config, world_size=world_size)
    assert outcome.codes == [EXIT_FINISHED] * world_size
    assert expected in outcome.output
    assert losses(run_dir) == losses(clean_dir)
    assert_same_weights(run_dir, clean_dir)
    checkpoints = run_dir / "checkpoints"
    steps = whole_checkpoints(run_dir)
    names = sorted(["latest", *(f"step-{step:08d}" for step in steps)])
    assert sorted(path.name for path in checkpoints.iterdir()) == names, "leftovers"
    assert (checkpoints / "latest").read_text() == f"step-{steps[0]:08d}"


def assert_same_weights(run_dir: Path, clean_dir: Path) -> None:
    """Every parameter of the newest checkpoints, bit for bit."""
    found, expected = (candidates(folder)[0] for folder in (run_dir, clean_dir))
    assert found.step == expected.step
    ours, theirs = ZeroFiles(found.folder), ZeroFiles(expected.folder)
    assert ours.shapes == theirs.shapes
    different = [name for name in theirs.shapes if not torch.equal(ours.read_weight(name), theirs.read_weight(name))]
    assert not different, different


def kill_a_rank_after_each(steps: Sequence[int], command: Sequence[str | Path], folder: Path, run_dir: Path) -> None:
    """Start a run of two ranks for each of the steps, and kill one of them when that step is done; each goes on.

    Args:
        folder: for the gate that holds the ranks at the step.
    """
    gate = Gate(folder)
    for step in steps:
        gate.close_after(step)
        process = start_maskwright(*command, **gate.environment)
        wait_for_step(process, run_dir, step)
        os.kill(rank_processes(process)[step % 2], signal.SIGKILL)
        gate.open()
        output = process.communicate(timeout=TIMEOUT_S)[0]
        assert process.returncode == 1, output


def assert_all_ranks_say(run_dir: Path, words: str, world_size: int = 2) -> None:
    """I2: the log of each rank has the words."""
    for rank in range(world_size):
        log = (run_dir / "logs" / f"rank-{rank:05d}.log").read_text(encoding="utf-8", errors="replace")
        assert words in log, f"rank {rank}:\n{log}"


def processes_with(mark: str) -> list[str]:
    """Command lines of the processes of a command that was started with `tests.forked.MARK` set to a mark (I3)."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdecimal() and any(mark.encode() in (folder / name).read_bytes() for name in MARKED):
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # ended meanwhile
            continue
    return found
