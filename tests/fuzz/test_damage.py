"""Random damage to a run folder, its checkpoints, its data and its tokenizer: named or harmless, never other losses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.faults import DROPOUT
from tests.fuzz.damages import damage
from tests.fuzz.harness import Outcome, call, seeds, try_all
from tests.ranks import losses, tiny_config, write_config
from trainer.errors import EXIT_DAMAGED, EXIT_FINISHED, EXIT_USER_MISTAKE
from trainer.runtime.run_lock import GUARD

CASES = 20
STEPS, NEWEST, OLDER = 8, "step-00000006", "step-00000004"
CONFIG = "my.yaml"
REFUSED = (EXIT_USER_MISTAKE, EXIT_DAMAGED)


@pytest.mark.timeout(7200)
def test_damage_is_named_or_harmless_and_never_changes_losses(workspace: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    assert not try_all(make_base, [0], tmp_path, workspace, base)
    clean = losses(base / "run")
    assert len(clean) == STEPS
    shutil.rmtree(base / "run" / "checkpoints" / f"step-{STEPS:08d}")  # as if the machine had died before that
    problems = try_all(try_damage, seeds(CASES), tmp_path, base, clean)
    assert not problems, f"{len(problems)} problems\n" + "\n".join(problems)


def make_base(_seed: int, _folder: Path, workspace: Path, base: Path) -> list[str]:
    """A run of its own data and tokenizer, whose config names them as they lie beside it."""
    base.mkdir()
    for name in ("data", "tokenizer"):
        shutil.copytree(workspace / name, base / name)
    overrides = {**tiny_config(workspace, base).model.overrides, **DROPOUT}
    config = tiny_config(
        workspace,
        Path("run"),
        model={"tokenizer": "tokenizer", "overrides": overrides, "document_attention": True},
        data={"train": "data", "validation": "data"},
        train={"steps": STEPS},
        checkpoint={"every_steps": 2, "keep_last": 3},
        eval={"every_steps": 4, "samples": 8},
        logging={"every_steps": 1, "tensorboard": True},
    )
    write_config(config, base / CONFIG)
    outcome = call("train", CONFIG, cwd=base)
    return [] if outcome.code == EXIT_FINISHED else [outcome.output]


def try_damage(seed: int, folder: Path, base: Path, clean: list[float]) -> list[str]:
    """Runs in a process for many: one damage, and the commands that meet it. Returns what is wrong."""
    generator = Random(seed)
    place = folder / "place"
    shutil.copytree(base, place)
    files = sorted(path for path in place.rglob("*") if path.is_file() and path.name != CONFIG)
    kinds = {kind: [path for path in files if kind_of(path.relative_to(place)) == kind] for kind in KINDS}
    path = generator.choice(kinds[generator.choices(KINDS, (5, 2, 5, 1, 5))[0]])
    before = {file: file.read_bytes() for file in files}
    done = damage(generator, path, files)
    changed = {file.relative_to(place) for file, content in before.items() if not is_same(file, content)}
    hit = {kind_of(file) for file in changed}
    shown = f"{done}: {path.relative_to(place)}"
    problems = list[str]()

    def run(*arguments: str | Path, expected: tuple[int, ...] = ()) -> Outcome:
        outcome = call(*arguments, cwd=place)
        problem = outcome.problem(*expected)
        if problem is not None:
            problems.append(f"{shown}\n{' '.join(map(str, arguments))}: {problem}\n{outcome.output[-2500:]}")
        return outcome

    run("status", "run", expected=(EXIT_FINISHED,) if not hit & {"checkpoint", "older"} else ())
    run("checkpoint", "list", "run", *generator.choice(((), ("--json",))))
    if "data" in hit:
        run("data", "verify", "data", expected=REFUSED)
    if hit & {"checkpoint", "older"}:
        run("checkpoint", "verify", "run", expected=REFUSED)
    if generator.random() < 0.5:
        run("data", "show", "data/train")
        run("convert", "run", "--output", "model")
    run("validate", CONFIG)
    right = ()
    if hit <= {"checkpoint", "older", "side"}:
        right = (EXIT_FINISHED, EXIT_DAMAGED) if {"checkpoint", "older"} <= hit else (EXIT_FINISHED,)
    if not (place / "run" / GUARD).is_file():  # whether somebody else is at work cannot be known then
        right = (EXIT_FINISHED, EXIT_USER_MISTAKE)
    outcome = run("train", CONFIG, expected=right)
    if "checkpoint" in hit and outcome.code == EXIT_FINISHED:
        first = min(str(file) for file in changed if kind_of(file) == "checkpoint")
        if "CHECKPOINT DAMAGED" not in outcome.output or f"resuming from {OLDER}" not in outcome.output:
            problems.append(f"{shown}\nthe damage of {first} is not named\n{outcome.output[-2500:]}")
    if outcome.code == EXIT_FINISHED:
        resumed_at = int((OLDER if "checkpoint" in hit else NEWEST).rpartition("-")[2])
        problems += [f"{shown}\n{problem}" for problem in compare(place / "run" / "metrics.jsonl", clean, resumed_at)]
    return problems


KINDS = ("checkpoint", "older", "data", "tokenizer", "side")


def kind_of(path: Path) -> str:
    """What a file below the folder belongs to."""
    if path.parts[:3] == ("run", "checkpoints", NEWEST):
        return "checkpoint"
    if path.parts[:2] == ("run", "checkpoints") and path.name != "latest":
        return "older"
    return {"data": "data", "tokenizer": "tokenizer"}.get(path.parts[0], "side")


def is_same(path: Path, content: bytes) -> bool:
    try:
        return not path.is_symlink() and path.is_file() and path.read_bytes() == content
    except OSError:
        return False


def compare(path: Path, clean: list[float], resumed_at: int) -> list[str]:
    """The losses of the steps since the resume are those of the clean run."""
    found: dict[int, Any] = {}
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        return [f"no metrics: {error}"]
    for line in text.splitlines():
        try:
            entry = json.loads(line)
            if entry["step"] > resumed_at and "train/loss" in entry:
                found[entry["step"]] = entry["train/loss"]
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
    expected = dict(enumerate(clean[resumed_at:], resumed_at + 1))
    return [] if found == expected else [f"losses {found} in place of {expected}"]
