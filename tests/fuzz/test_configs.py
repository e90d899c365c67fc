"""Random configs: whatever is in them, `validate` ends in order, and what it accepts starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.configs import random_config
from tests.fuzz.harness import call, seeds, try_all

CASES = 60
CANNOT_RUN_HERE = (
    "This device cannot train in fp16.",
    "backend of torch's attention cannot be used",
    "DeepSpeed quantizes on GPUs only.",
)
"""Words of the card of what is right elsewhere."""


@pytest.mark.timeout(7200)
def test_validate_ends_in_order_and_what_it_accepts_starts(workspace: Path, tmp_path: Path) -> None:
    problems = try_all(try_config, seeds(CASES), tmp_path, workspace)
    assert not problems, f"{len(problems)} problems\n" + "\n".join(problems)


def try_config(seed: int, folder: Path, workspace: Path) -> list[str]:
    """Runs in a process for many: one config. Returns what is wrong."""
    arguments = random_config(seed, workspace, folder)
    shown = "\n".join([Path(arguments[0]).read_text(encoding="utf-8", errors="replace")[:3000], *arguments[1:]])
    outcome = call("validate", *arguments, cwd=folder)
    problem = outcome.problem(0, 2, 3)
    if problem is not None:
        return [f"validate: {problem}\n{outcome.output[-3000:]}\n--- config\n{shown}"]
    if outcome.code == 0 and is_small(arguments):
        outcome = call("train", *arguments, "--dry-run", cwd=folder)
        problem = outcome.problem(0, 2)
        if problem is None and outcome.code == 2 and not any(words in outcome.output for words in CANNOT_RUN_HERE):
            problem = "validate has accepted it"
        if problem is not None:
            return [f"train --dry-run: {problem}\n{outcome.output[-3000:]}\n--- config\n{shown}"]
    if outcome.code != 0 and (folder / "run").exists():
        return [f"it is refused, and a run folder is there\n--- config\n{shown}"]
    return []


def is_small(arguments: list[str]) -> bool:
    """Whether one step of it is done in a moment."""
    from trainer.config.file import load_config

    config = load_config(arguments[0], arguments[1:])
    sizes = config.model.overrides
    return (
        not config.model.compile
        and config.data.workers <= 2
        and config.data.seq_len <= 64
        and config.batch.global_size * config.data.seq_len <= 100_000
        and config.eval.samples <= 10_000
        and sizes.get("hidden_size", 768) <= 64
        and sizes.get("num_hidden_layers", 12) <= 4
        and all(abs(size) < 10_000 for size in sizes.values() if isinstance(size, (int, float)))
    )
