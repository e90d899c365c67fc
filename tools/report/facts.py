"""The words and numbers of the report, made of what the runs tell."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from tools.report.gather import Example, RunRecord
from trainer.runtime.plain_text import shorten
from trainer.tracking.status import ENDED

MOST_EVALUATIONS = 100
"""Rows of the table; of more, evenly spread ones."""
MOST_EXAMPLE_ROWS = 12
_MOST_EVENTS = 100
_COUNTERS = ("step", "samples", "tokens", "time")
_NAMES = ("run.name", "run.dir")
_TILES = (
    ("eval/perplexity", "perplexity"),
    ("eval/masked_accuracy", "masked tokens told right"),
    ("eval/accuracy", "tokens told right"),
)


@dataclass(frozen=True)
class Value:
    """A number of a file: as a person reads it, and as it is written there."""

    text: str
    exact: str

    @classmethod
    def of(cls, number: Any, share: bool = False) -> Value:
        if type(number) not in (int, float):
            return cls("–", "")
        text = f"{number:.2%}" if share else f"{number:,}" if type(number) is int else f"{number:,.5g}"
        return cls(shorten(text, 40), json.dumps(number))


@dataclass(frozen=True)
class ExampleTable:
    """One example over time; `rows` has a step, the answers (text, right) and how many are right."""

    example: Example
    rows: list[tuple[int, list[tuple[str, bool]], int]]


def facts(run: RunRecord) -> dict[str, str]:
    """Say what the run is, what of it is known."""
    status, settings, checkpoint = run.view.status, run.settings, run.checkpoint
    said = {
        "state": state(run),
        "step": f"{_last(run, 'step', status.step):,}" + (f" of {status.total_steps:,}" if status.total_steps else ""),
        "tokens seen": f"{_last(run, 'tokens', status.tokens):,}",
        "model": _model(run),
        "data": _data(run),
        "objective": ", masks by ".join(_known(settings, "objective.name", "objective.scheme")),
        "batch": _batch(settings),
        "learning rate": ", ".join(_known(settings, "optimizer.lr", "schedule.name")),
        "optimizer": " ".join(_known(settings, "optimizer.name")),
        "precision": ", ".join(_known(settings, "train.precision", "deepspeed")),
        "ranks": _ranks(run),
        "started": _moment(_first_moment(run)),
        "last heard": _moment(_last_moment(run)),
        "took": _took(run),
        "versions": ", ".join(f"{name} {version}" for name, version in checkpoint.versions.items())
        if checkpoint
        else "",
        "folder": str(run.view.run_dir),
    }
    return {name: text for name, text in said.items() if text}


def state(run: RunRecord) -> str:
    """Say in which state the run is, and why."""
    view = run.view
    reason = f" ({view.status.reason})" if view.status.reason else ""
    return f"{view.state}{reason}" + (f"; it looks dead: {view.death}" if view.death else "")


def mood(run: RunRecord) -> str:
    """Say how a state is coloured: good, bad, or neither."""
    if run.view.death or run.view.state in ("failed", "diverged"):
        return "bad"
    return "good" if run.view.state == "finished" else "open" if run.view.state in ENDED else "going"


def tiles(run: RunRecord) -> list[tuple[str, Value, str]]:
    """List the numbers that are asked for first: what, its value, and where it is from."""
    found = []
    for lines, name, what in ((run.training, "train/loss", "training loss"), (run.evaluations, "eval/loss", "loss")):
        found += _tile(lines, name, what)
    for name, what in _TILES:
        found += _tile(run.evaluations, name, what)
    return [*found, *_tile(run.training, "throughput/tokens_per_second", "tokens a second")]


def _tile(lines: Sequence[dict[str, Any]], name: str, what: str) -> Iterator[tuple[str, Value, str]]:
    line = next((line for line in reversed(lines) if line.get(name) is not None), None)
    if line is not None:
        where = "validation, " if name.startswith("eval/") else ""
        yield what, Value.of(line[name], is_share(name)), f"{where}step {line['step']:,}"


def is_share(name: str) -> bool:
    """Tell whether a metric is shown in per cent."""
    return name.endswith(("accuracy", "precision", "recall", "ignored", "_fraction", "/mfu"))


def last_values(runs: Sequence[RunRecord]) -> list[tuple[str, list[Value]]]:
    """List the last value of each metric, of each run."""
    last: list[dict[str, Any]] = []
    for run in runs:
        values: dict[str, Any] = {}
        for line in run.lines:
            values.update({name: value for name, value in line.items() if value is not None})
        last.append(values)
    names = sorted({name for values in last for name in values if name not in (*_COUNTERS, "event")})
    rows = ["step", "samples", "tokens", *names]
    return [
        (name, [Value.of(values.get(name), is_share(name)) for values in last])
        for name in rows
        if any(name in values for values in last)
    ]


def evaluations(run: RunRecord) -> tuple[list[str], list[list[Value]]]:
    """Make the table of evaluations: its headings, and its rows."""
    names = sorted({name for line in run.evaluations for name in line if name not in _COUNTERS})
    headings = ["step", "tokens", *names]
    rows = [
        [Value.of(line.get(name), is_share(name)) for name in headings]
        for line in spread(run.evaluations, MOST_EVALUATIONS)
    ]
    return headings, rows


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """Take evenly spread items, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


def differing_settings(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """List the settings that are not the same in all runs, each as it stands in the config."""
    names = sorted({name for run in runs for name in run.settings} - {*_NAMES})
    rows = [(name, [as_setting(run.settings.get(name)) for run in runs]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def as_setting(value: Any) -> str:
    """Write a setting on one line."""
    return shorten(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str), 300)


def happenings(run: RunRecord) -> list[tuple[str, str, str]]:
    """List starts and events in the order of their steps: step, what, and what is known of it."""
    found: list[tuple[int, float, str, str]] = []
    for number, start in enumerate(run.starts):
        job = f", SLURM job {start.job}" + (f", restart {start.restart}" if start.restart else "") if start.job else ""
        told = f"{_moment(start.time)}, {start.world:,} rank{'s' if start.world != 1 else ''} on {start.nodes}{job}"
        found.append((start.step, start.time, "restart" if number else "start", told))
    for line in run.events:
        first, end = line.get("event/first_sample"), line.get("event/end_sample")
        samples = ""
        if isinstance(first, int) and isinstance(end, int):
            samples = f" (samples t = {first:,} to {end - 1:,})"
        from_step = line.get("event/from_step")
        where = f"at step {from_step:,}: " if type(from_step) is int and from_step != line["step"] else ""
        told = f"{where}{line.get('event/reason') or ''}{samples}"
        found.append((line["step"], _seconds(line.get("time")), str(line["event"]), told))
    rows = sorted(found, key=lambda row: row[:2])
    return [(f"{step:,}", what, shorten(told, 400)) for step, _, what, told in spread(rows, _MOST_EVENTS)]


def example_tables(run: RunRecord) -> list[ExampleTable]:
    """Follow each example of the last evaluation back through those that show the same text."""
    tables = []
    for example in run.examples[-1].examples if run.examples else ():
        rows = []
        for line in run.examples:
            for before in line.examples:
                if before.t == example.t and _question(before) == _question(example):
                    answers = [(piece.answer, piece.right) for piece in before.pieces if piece.answer is not None]
                    rows.append((line.step, answers, sum(right for _, right in answers)))
        if rows and rows[-1][1]:
            tables.append(ExampleTable(example, spread(rows, MOST_EXAMPLE_ROWS)))
    return tables


def visible(text: str) -> str:
    """Write a token so that one of blanks alone is seen."""
    return text.strip() or text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣") or "∅"


def _question(example: Example) -> list[tuple[str, bool]]:
    return [(piece.text, piece.answer is None) for piece in example.pieces]


def _known(settings: dict[str, Any], *names: str) -> Iterable[str]:
    return (as_setting(settings[name]) for name in names if settings.get(name) is not None)


def _model(run: RunRecord) -> str:
    if run.checkpoint is None:
        return " ".join(_known(run.settings, "model.preset", "model.config", "model.from_pretrained"))
    model = run.checkpoint.model
    parameters, frozen = (model.get(name) for name in ("parameters", "frozen"))
    size = f", {parameters:,} parameters" if type(parameters) is int else ""
    return f"{model.get('class', '')}{size}" + (f", {frozen:,} of them frozen" if type(frozen) is int else "")


def _data(run: RunRecord) -> str:
    sources = run.checkpoint.data_order.get("sources") if run.checkpoint is not None else None
    if not isinstance(sources, list):
        return " ".join(_known(run.settings, "data.train.path"))
    told = [
        f"{source.get('name')}: {source['tokens']:,} tokens"
        for source in sources
        if isinstance(source, dict) and type(source.get("tokens")) is int
    ]
    return "; ".join(told)


def _batch(settings: dict[str, Any]) -> str:
    size, length = settings.get("batch.global_size"), settings.get("data.seq_len")
    return f"{as_setting(size)} sequences of {as_setting(length)} tokens" if size and length else ""


def _ranks(run: RunRecord) -> str:
    worlds = [start.world for start in run.starts] or [run.view.status.world_size]
    changes = [world for number, world in enumerate(worlds) if not number or world != worlds[number - 1]]
    nodes = f" on {', '.join(run.view.status.nodes)}" if run.view.status.nodes else ""
    return shorten(f"{', then '.join(map(str, changes))}{nodes}", 200) if changes[-1] else ""


def _last(run: RunRecord, name: str, otherwise: int) -> int:
    values = [line[name] for line in run.lines if type(line.get(name)) is int]
    return max(otherwise, values[-1]) if values else otherwise


def _first_moment(run: RunRecord) -> float:
    times = [start.time for start in run.starts] + [_seconds(line.get("time")) for line in run.lines]
    return min((time for time in times if time), default=0.0)


def _last_moment(run: RunRecord) -> float:
    return max((_seconds(line.get("time")) for line in (*run.lines, *run.events)), default=0.0)


def _took(run: RunRecord) -> str:
    first, last = _first_moment(run), _last_moment(run)
    pauses = ", pauses between starts included" if len(run.starts) > 1 else ""
    return f"{timedelta(seconds=round(last - first))}{pauses}" if last > first else ""


def _seconds(value: Any) -> float:
    """Read a time; 0 for what is none that a calendar has."""
    return float(value) if type(value) in (int, float) and 0 < value < 1e11 else 0.0


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC") if seconds else ""
