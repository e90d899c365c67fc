"""What a run folder tells, read for the report: settings, curves, starts, examples, and what the loss compares with.

Nothing here is trusted: a run may be going on, have been killed, be an earlier version's, or have files that a person
has changed. What cannot be read is left out, with a note on the page.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tools.baselines import unigram_cross_entropy
from tools.prepare.text_cache import CACHE_FOLDER
from tools.status import RunView, look_at
from trainer.checkpoint.manifest import DATA_ORDER, MODEL_FOLDER, CheckpointManifest, try_manifest
from trainer.config import Config
from trainer.data.manifest import MANIFEST, read_data_manifest, split_folder
from trainer.errors import MaskwrightError, UserError
from trainer.runtime.paths import real_path
from trainer.runtime.plain_text import shorten
from trainer.runtime.side_files import read_json_object, read_lines
from trainer.runtime.typed_json import Count, as_type
from trainer.runtime.user_files import read_yaml
from trainer.tracking.jsonl import read_metrics
from trainer.tracking.starts import STARTS, StartRecord, read_start_records


@dataclass(frozen=True)
class Piece:
    """A piece of an example's text; where `answer` is told, one predicted token. `shown` is what the model is shown."""

    text: str
    shown: str | None = None
    answer: str | None = None
    right: bool = False


@dataclass(frozen=True)
class Example:
    """A sample at one evaluation."""

    t: Count
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Examples:
    """A line of examples.jsonl, as `trainer.evaluation.examples` makes it."""

    step: Count
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class RunRecord:
    """One run.

    Attributes:
        name: that tells it from the others of the page.
        training, evaluations, events: lines of metrics.jsonl.
        settings: the frozen config, by dotted key; empty where there is none that can be read.
        checkpoint: the manifest of the newest checkpoint that has one.
        vocabulary_size: V, rows of the model's output; None where it is not known.
        unigram: see `tools.baselines`, nats; None where it is not known.
        notes: what is left out, and why.
    """

    name: str
    view: RunView
    training: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    starts: list[StartRecord] = field(default_factory=list)
    examples: list[Examples] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    checkpoint: CheckpointManifest | None = None
    vocabulary_size: int | None = None
    unigram: float | None = None
    notes: list[str] = field(default_factory=list)

    @cached_property
    def lines(self) -> list[dict[str, Any]]:
        """All that has values, step by step."""
        return sorted([*self.training, *self.evaluations], key=lambda line: line["step"])


def gather(runs: list[str]) -> list[RunRecord]:
    """Read the runs.

    Raises:
        UserError: for a folder without a run, or one that is given twice.
    """
    views = [look_at(run) for run in runs]
    places = [real_path(view.run_dir) for view in views]
    for number, place in enumerate(places):
        if place in places[:number]:
            problem = f"'{runs[number]}' is a run that is given already."
            raise UserError(problem, where=runs[number], remedy="Give each run once.")
    found = [_settings(view.run_dir) for view in views]
    names = [str(settings.get("run.name") or place.name) for (settings, _), place in zip(found, places, strict=True)]
    if len(set(names)) < len(names):  # the same name in several folders: these tell them apart
        names = runs
    return [_gather(name, view, *of_run) for name, view, of_run in zip(names, views, found, strict=True)]


def _gather(name: str, view: RunView, settings: dict[str, Any], notes: list[str]) -> RunRecord:
    folder = view.run_dir
    lines = read_metrics(folder / "metrics.jsonl")
    examples = read_lines(folder / "examples.jsonl", lambda line: as_type(Examples, line))
    starts = read_start_records(folder)
    for file, records in (("metrics.jsonl", lines), ("examples.jsonl", examples), (STARTS, starts)):
        if left_out := _line_count(folder / file) - len(records):
            notes.append(f"{file}: {left_out:,} of its lines cannot be understood, and are left out.")
    checkpoint = next(_manifests(folder), None)
    vocabulary_size, unigram = _baselines(folder, settings, checkpoint, notes)
    return RunRecord(
        name=name,
        view=view,
        training=[line for line in lines if "train/loss" in line],
        evaluations=[line for line in lines if "train/loss" not in line and "event" not in line],
        events=[line for line in lines if "event" in line],
        starts=starts,
        examples=examples,
        settings=settings,
        checkpoint=checkpoint,
        vocabulary_size=vocabulary_size,
        unigram=unigram,
        notes=notes,
    )


def _settings(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Read the frozen config by dotted key; and a note where that is not possible."""
    path = folder / "config.yaml"
    if not path.is_file():
        return {}, ["config.yaml is not there, so no settings are shown."]
    try:
        found = read_yaml(path)
    except UserError as error:
        return {}, [f"config.yaml cannot be read, so no settings are shown: {error.problem}"]
    if not isinstance(found, dict):
        return {}, ["config.yaml holds no settings, so none are shown."]
    with suppress(ValidationError, MaskwrightError):  # a key that an earlier version did not know was as its default is
        found = Config.model_validate({"defaults": 1, **found}).model_dump(mode="json")
    return dict(_flat("", found)), []


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield settings by dotted key; lists are values, but for a single source of data."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        (value,) = value
    if not isinstance(value, dict) or not value:
        yield prefix, value
        return
    for key, inner in value.items():
        yield from _flat(f"{prefix}.{key}" if prefix else str(key), inner)


def _line_count(path: Path) -> int:
    try:
        return sum(1 for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if line.strip())
    except OSError:
        return 0


def _manifests(folder: Path) -> Iterator[CheckpointManifest]:
    """Yield the manifests of checkpoints that have one, newest first."""
    for path in sorted((folder / "checkpoints").glob("step-*/manifest.json"), reverse=True):
        manifest, _ = try_manifest(path.parent)
        if manifest is not None:
            yield manifest


def _baselines(
    folder: Path, settings: dict[str, Any], checkpoint: CheckpointManifest | None, notes: list[str]
) -> tuple[int | None, float | None]:
    """Find the size of the vocabulary, and the unigram cross-entropy where the data set is there."""
    size = None
    if checkpoint is not None:
        config = read_json_object(folder / "checkpoints" / f"step-{checkpoint.step:08d}" / MODEL_FOLDER / "config.json")
        size = (config or {}).get("vocab_size")
    train, validation = settings.get("data.train.path"), settings.get("data.validation")
    try:
        if not (isinstance(train, str) and isinstance(validation, str)):
            return _size(size), None  # several sources, or none to compare with
        trained_on = _data_set(folder, settings, train)
        held_out = trained_on if validation in ("auto", train) else _found_from(folder, settings, validation)
        trained_on, held_out = split_folder(trained_on, "train"), split_folder(held_out, "validation")
        size = _size(size) or read_data_manifest(trained_on).vocabulary_size
        unigram = unigram_cross_entropy(trained_on, held_out, size)
    except (MaskwrightError, OSError) as error:
        said = error.problem if isinstance(error, MaskwrightError) else str(error)
        notes.append(f"The loss of guessing by frequency is not shown, for want of the data: {shorten(said)}")
        return _size(size), None
    return size, unigram if math.isfinite(unigram) else None


def _data_set(folder: Path, settings: dict[str, Any], path: str) -> Path:
    """Find the data set behind a path: what lies there or, of raw text, what the run has prepared of it."""
    given = _found_from(folder, settings, path)
    if (split_folder(given, "train") / MANIFEST).exists():
        return given
    cache = settings.get("data.text.cache")
    prepared = _found_from(folder, settings, cache) if isinstance(cache, str) else folder.parent / CACHE_FOLDER
    order = read_json_object(folder / DATA_ORDER) or {}
    begun = [source.get("fingerprint") for source in order.get("sources", []) if isinstance(source, dict)]
    for manifest in sorted(prepared.glob(f"*/train/{MANIFEST}")) if begun else ():
        with suppress(MaskwrightError):
            if read_data_manifest(manifest.parent).fingerprint in begun:
                return manifest.parent.parent
    return given


def _size(found: Any) -> int | None:
    return found if type(found) is int and 1 < found < 1 << 32 else None


def _found_from(folder: Path, settings: dict[str, Any], path: str) -> Path:
    """Find a path of the config, which is relative to where the run was started: `run.dir` tells where that was."""
    run_dir, folder = Path(str(settings.get("run.dir", "."))), real_path(folder)
    parts = run_dir.parts
    if run_dir.is_absolute() or Path(path).is_absolute() or ".." in parts or folder.parts[-len(parts) :] != parts:
        return Path(path)
    return Path(*folder.parts[: -len(parts)]) / path
