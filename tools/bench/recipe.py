"""`maskwright bench recipe`: seconds and tokens to a held-out loss, for whole recipes, beside Hugging Face's Trainer.

A recipe is trained by `maskwright train` as a user would start it, with an evaluation every so many steps. Trainer gets
the same first weights, blocks and held-out blocks, twice: with its own defaults, and with the first recipe's numbers.
All have as many tokens before them and are judged by the same masks; each stops when it is down to the loss. Seconds
are those of training alone: neither starting nor evaluating is in them. The arms take turns, once for each seed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from tools.bench.common import cpu_seconds, in_own_processes, take_turns
from tools.bench.recipe_report import Arm, RecipeMeasurement, RecipeReport, draw_curves
from tools.machine import describe_machine
from trainer.config import Config
from trainer.config.file import load_config
from trainer.errors import EXIT_FINISHED, EXIT_STOPPED_AFTER_SAVING, MaskwrightError, UserError
from trainer.runtime.paths import user_path
from trainer.runtime.plain_text import shorten
from trainer.runtime.process import make_die_with_parent
from trainer.schedule.mask_ratio import evaluated_ratio
from trainer.tracking.jsonl import read_metrics

DEFAULTS, TUNED = "trainer", "trainer-tuned"
AGAINST = {"defaults": (DEFAULTS,), "tuned": (TUNED,), "both": (DEFAULTS, TUNED), "none": ()}
"""What `--against` stands for."""
_WHAT = {
    DEFAULTS: "Hugging Face Trainer, its defaults: batches of 8, 5e-5 falling linearly, masks of 15 %",
    TUNED: "Hugging Face Trainer with the recipe's batch, AdamW, schedule and mask ratio",
}
_HELD_OUT = (
    *(f"objective.{key}" for key in ("name", "pair", "teacher", "scheme", "lengths", "replace_by")),
    *("objective.replace_mask", "objective.replace_random", "data.validation", "data.samples", "data.seq_len"),
    *(f"data.text.{key}" for key in ("format", "field", "delimiter", "documents", "special_in_text")),
    *("data.text.validation_fraction", "model.tokenizer", "eval.samples"),
)
"""What a held-out loss is of. The share that is predicted is that of the first recipe for all of them."""
EVALUATIONS = 20
"""Of a run, where nobody says how many steps are between two."""
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class RecipeBenchmark:
    """What `bench recipe` is asked to measure.

    Attributes:
        configs: recipes or config files; Trainer gets the model and the data of the first.
        overrides: `key=value`, of all of them.
        target: held-out loss to reach; None trains to the end.
        every_steps: between two evaluations; None makes a twentieth of each run.
        folder: where runs and prepared text stay; None for a temporary one.
        chart: PNG file for the curves.
        markdown: file for the table.
    """

    configs: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    target: float | None = None
    seeds: tuple[int, ...] = (0,)
    against: str = "both"
    every_steps: int | None = None
    folder: str | None = None
    chart: str | None = None
    markdown: str | None = None


def bench_recipe(settings: RecipeBenchmark, console: Console) -> RecipeReport:
    """Train all arms, in turns.

    Raises:
        UserError: for a config that does not fit, or a file that cannot be written.
        MaskwrightError: when an arm fails.
    """
    configs = {name: load_config(name, settings.overrides) for name in settings.configs}
    _check(configs, settings)
    for option, given in (("--markdown", settings.markdown), ("--chart", settings.chart)):
        if given is not None and not user_path(given, option).parent.is_dir():
            raise UserError(
                f"There is no folder for '{given}'.", where=f"{option} {given}", remedy="Make it, or name another one."
            )
    machine = describe_machine(with_gpus=True)
    with _folder_of(settings) as folder:
        arms: dict[str, Callable[[int], RecipeMeasurement]] = {
            name: lambda seed, name=name: _train_recipe(settings, name, configs, seed, folder) for name in configs
        }
        for name in AGAINST[settings.against]:
            arms[name] = lambda seed, name=name: _train_by_trainer(settings, name, seed, folder)
        seeds = {name: iter(settings.seeds) for name in arms}
        turns = {name: lambda name=name: arms[name](next(seeds[name])) for name in arms}
        measurements = take_turns("recipes", turns, len(settings.seeds), console)
    report = RecipeReport(
        settings=dataclasses.asdict(settings),
        machine=machine,
        arms=[Arm(name, _WHAT.get(name, _describe(configs[name]) if name in configs else "")) for name in arms],
        measurements=measurements,
        target=settings.target,
        first=settings.configs[0],
    )
    if settings.markdown is not None:
        Path(settings.markdown).write_text(report.to_markdown(), encoding="utf-8")
    if settings.chart is not None:
        draw_curves(report, Path(settings.chart))
    return report


def _check(configs: Mapping[str, Config], settings: RecipeBenchmark) -> None:
    if not configs or len(configs) < len(settings.configs):
        raise UserError(
            "Give each config once." if configs else "There is no config to train.",
            where="CONFIG",
            remedy="Name recipes or config files, and what differs in each of them; `extends:` makes one of another.",
        )
    for name, config in configs.items():
        if config.data.validation is None:
            raise UserError(
                f"{name} has no held-out data, so there is no loss to reach.",
                where="data.validation",
                remedy="Set data.validation=auto, or name a text or a data set.",
            )
    first = configs[settings.configs[0]]
    for name, config in configs.items():
        keys = (*_HELD_OUT, "data.train") if first.data.validation == "auto" else _HELD_OUT
        if unlike := next((key for key in keys if _value(config, key) != _value(first, key)), None):
            raise UserError(
                f"The held-out losses of {name} and {settings.configs[0]} could not be compared: {unlike} is "
                f"{_shown(_value(config, unlike))} and {_shown(_value(first, unlike))}.",
                where=unlike,
                remedy=f"Give both the same, or add {unlike}=... to the command, which holds for all of them.",
            )
    for arm in AGAINST[settings.against]:
        if found := _not_by_trainer(first, arm):
            what, key = found
            raise UserError(
                f"Trainer is compared on masked language modelling, and {settings.configs[0]} {what}.",
                where=f"--against {settings.against}, {key}",
                remedy="Add --against none, which compares recipes alone"
                + (", or --against defaults." if arm == TUNED and not _not_by_trainer(first, DEFAULTS) else "."),
            )


def _value(config: Config, key: str) -> Any:
    """Read a dotted key."""
    return functools.reduce(getattr, key.split("."), config)


def _shown(value: Any) -> str:
    return "null" if value is None else shorten(str(value))


def _not_by_trainer(config: Config, arm: str) -> tuple[str, str] | None:
    """Say what of a config this arm of Trainer would not do, and would be compared as if it did; and its key."""
    objective, data = config.objective, config.data
    by_size = len(data.train) == 1 or (data.temperature == 1 and not data.stages)
    of_any = (
        (objective.name != "mlm", f"trains by {objective.name}", "objective.name"),
        (objective.pair is not None, "tells pairs as well", "objective.pair"),
        (objective.teacher is not None, "has a teacher", "objective.teacher"),
        (data.samples == "documents", "reads whole documents", "data.samples"),
        (config.model.document_attention, "keeps attention within documents", "model.document_attention"),
        (not by_size, "mixes sources by their weights", "data.train"),
    )
    of_tuned = (
        (bool(data.phases), "has phases", "data.phases"),
        (config.batch.warmup is not None, "has a batch that grows", "batch.warmup"),
        (len(objective.mask_ratios) > 1, "has several mask ratios", "objective.mask_ratio"),
    )
    checks = (*of_any, *of_tuned) if arm == TUNED else of_any
    return next(((what, key) for is_so, what, key in checks if is_so), None)


def _describe(config: Config) -> str:
    optimizer, schedule = config.optimizer, config.schedule
    return f"maskwright: {optimizer.name} at {optimizer.lr:g}, {schedule.name}, {config.batch.global_size} sequences"


@contextmanager
def _folder_of(settings: RecipeBenchmark) -> Iterator[Path]:
    """Give the folder in which arms are trained; a temporary one is removed."""
    if settings.folder is None:
        with tempfile.TemporaryDirectory(prefix="maskwright-bench-") as folder:
            yield Path(folder)
        return
    folder = user_path(settings.folder, "--dir")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"'{folder}' is not empty.", where=f"--dir {folder}", remedy="Name a new folder.")
    folder.mkdir(parents=True, exist_ok=True)
    yield folder


def _train_recipe(
    settings: RecipeBenchmark, name: str, configs: Mapping[str, Config], seed: int, folder: Path
) -> RecipeMeasurement:
    """Train by the command, and end it when its loss is down to the target."""
    config, number = configs[name], settings.configs.index(name)
    ratio = evaluated_ratio(configs[settings.configs[0]])
    judged = [f"eval.mask_ratio={ratio}"] if evaluated_ratio(config) != ratio else []
    run = folder / f"recipe-{number}-seed-{seed}"
    every = settings.every_steps or _steps_of_twentieth(settings, name)
    own = [
        f"run.dir={run}",
        f"run.seed={seed}",
        f"eval.every_steps={every}",
        *judged,
        f"logging.every_steps={every}",  # so that each line has the speed of the steps before one evaluation
        "eval.patience=null",
        "checkpoint.keep_best=false",
        "checkpoint.every_steps=null",
        "logging.tensorboard=false",
        f"data.text.cache={config.data.text.cache or folder / 'text-cache'}",
    ]
    command = [sys.executable, "-P", "-m", "launcher", "train", name, *settings.overrides, *own]
    started = cpu_seconds()
    log = folder / f"{run.name}.log"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, **threads()},
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=make_die_with_parent(),
        )
        try:
            while process.poll() is None:
                time.sleep(_POLL_SECONDS)
                if settings.target is not None and _reached(read_curve(run), settings.target):
                    process.send_signal(signal.SIGTERM)
                    break
            code = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if code not in (EXIT_FINISHED, EXIT_STOPPED_AFTER_SAVING):
        raise MaskwrightError(
            f"`maskwright train {name}` ended with exit code {code}.",
            where=f"run.dir={run}",
            remedy="It said: " + log.read_text(errors="replace").strip()[-2000:],
        )
    curve = cut_at(read_curve(run), settings.target)
    return RecipeMeasurement(int(curve[-1][1]), curve[-1][2], cpu_seconds() - started, curve)


def _steps_of_twentieth(settings: RecipeBenchmark, name: str) -> int:
    """Find how many steps a twentieth of a run is, by its own plan; in a process of its own, which imports torch."""
    steps = in_own_processes(
        "tools.bench.recipe_trainer:plan_length", {"name": name, "overrides": list(settings.overrides)}, [threads()]
    )["steps"]
    return max(1, math.ceil(steps / EVALUATIONS))


def _train_by_trainer(settings: RecipeBenchmark, arm: str, seed: int, folder: Path) -> RecipeMeasurement:
    own = [
        f"run.seed={seed}",
        f"data.text.cache={folder / 'text-cache'}",
        "eval.every_steps=1",  # any number opens the held-out data, also where the config asks for no evaluation
    ]
    arguments: dict[str, Any] = {
        "name": settings.configs[0],
        "overrides": [*settings.overrides, *own],
        "tuned": arm == TUNED,
        "every_steps": settings.every_steps,
        "target": settings.target,
        "folder": str(folder / f"{arm}-seed-{seed}"),
    }
    measured = in_own_processes("tools.bench.recipe_trainer:train_by_trainer", arguments, [threads()])
    return RecipeMeasurement(**measured)


def threads() -> dict[str, str]:
    """Say how many threads torch has in each arm: as the environment says, else one a core."""
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(len(os.sched_getaffinity(0)))}


def read_curve(run: Path) -> list[list[float]]:
    """Read [step, tokens, seconds of training, held-out loss] of each evaluation so far from RUN/metrics.jsonl.

    The seconds are those that lines of training account for: their tokens over their tokens a second.
    """
    curve: list[list[float]] = []
    seconds, counted = 0.0, 0.0
    for line in read_metrics(run / "metrics.jsonl"):
        if speed := line.get("throughput/tokens_per_second"):
            seconds, counted = seconds + (line["tokens"] - counted) / speed, line["tokens"]
        if line.get("eval/loss") is not None:
            curve.append([line["step"], line["tokens"], seconds, line["eval/loss"]])
    return curve


def _reached(curve: Sequence[Sequence[float]], target: float) -> bool:
    return any(loss <= target for *_, loss in curve)


def cut_at(curve: list[list[float]], target: float | None) -> list[list[float]]:
    """Leave out what comes after the first evaluation at or below the target."""
    if target is None:
        return curve
    end = next((number for number, point in enumerate(curve) if point[3] <= target), len(curve) - 1)
    return curve[: end + 1]
