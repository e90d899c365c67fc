"""What the benchmarks share: variants that take turns, several times over, and what is said of them.

A speed is tokens a second of CPU time ("a core"): user and system time of the measuring process, all its threads and
its finished children. Wall time stands beside it. Variants are interleaved (A B C A B C …), so that whatever else the
machine does meets all of them, and a ratio is the median of the ratios of each round.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from tools.machine import describe_machine, machine_line
from tools.progress import StepProgress
from trainer.errors import MaskwrightError
from trainer.runtime.process import make_die_with_parent


@dataclass(frozen=True)
class Measurement:
    """One repetition of a variant.

    Attributes:
        tokens: processed by it.
        cpu_seconds: user and system time of the process, all threads and finished children.
    """

    tokens: int
    wall_seconds: float
    cpu_seconds: float


@dataclass(frozen=True)
class Variant:
    """One of the things compared: a short name, what it is, and one repetition of it."""

    name: str
    what: str
    run: Callable[[], Measurement]


@dataclass(frozen=True)
class Figure:
    """A figure over all rounds."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Ratio:
    """How many times faster `name` is than `over`: a core ("cpu") or by the clock ("wall")."""

    name: str
    over: str
    by: str = "cpu"


@dataclass(frozen=True)
class BenchReport:
    """The result of a benchmark.

    Attributes:
        settings: what was measured, as plain JSON.
        measurements: of each variant, one a round.
        notes: what a reader must know to judge the figures.
    """

    benchmark: str
    settings: dict[str, Any]
    machine: dict[str, Any]
    variants: Sequence[Variant]
    measurements: dict[str, list[Measurement]]
    ratios: Sequence[Ratio]
    notes: Sequence[str]

    def figure(self, name: str, by: str = "cpu") -> Figure:
        """Compute the tokens a second of a variant, a core or by the clock."""
        return Figure.of([_speed(measured, by) for measured in self.measurements[name]])

    def ratio(self, wanted: Ratio) -> Figure:
        pairs = zip(self.measurements[wanted.name], self.measurements[wanted.over], strict=True)
        return Figure.of([_speed(one, wanted.by) / _speed(other, wanted.by) for one, other in pairs])

    def to_json(self) -> str:
        facts = {
            "benchmark": self.benchmark,
            "settings": self.settings,
            "machine": self.machine,
            "variants": [self._describe(variant) for variant in self.variants],
            "ratios": [{**asdict(wanted), **asdict(self.ratio(wanted))} for wanted in self.ratios],
            "notes": list(self.notes),
        }
        return json.dumps(facts, indent=1, ensure_ascii=False)

    def print(self, console: Console) -> None:
        """Print the same for a person: a table, the ratios, the machine and the notes."""
        table = Table(box=None, pad_edge=False)
        table.add_column("M tokens/s")
        for heading in ("a core", "spread", "by the clock"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("what", overflow="fold")
        for variant in self.variants:
            core, wall = self.figure(variant.name), self.figure(variant.name, "wall")
            spread = f"{_millions(core.lowest)}–{_millions(core.highest)}"
            table.add_row(variant.name, _millions(core.median), spread, _millions(wall.median), variant.what)
        console.print(table)
        for wanted in self.ratios:
            found = self.ratio(wanted)
            by = "a core" if wanted.by == "cpu" else "by the clock"
            spread = f"{found.lowest:.2f}–{found.highest:.2f}"
            console.print(f"{wanted.name} over {wanted.over}, {by}: {found.median:.2f} × ({spread})")
        rounds = max(len(rows) for rows in self.measurements.values())
        console.print(f"{rounds} rounds, median and spread. {machine_line(self.machine)}")
        for note in self.notes:
            console.print(f"Note: {note}")

    def _describe(self, variant: Variant) -> dict[str, Any]:
        return {
            "name": variant.name,
            "what": variant.what,
            "tokens_per_cpu_second": asdict(self.figure(variant.name)),
            "tokens_per_second": asdict(self.figure(variant.name, "wall")),
            "rounds": [asdict(measured) for measured in self.measurements[variant.name]],
        }


def run_benchmark(
    benchmark: str,
    settings: dict[str, Any],
    variants: Sequence[Variant],
    ratios: Sequence[Ratio],
    notes: Sequence[str],
    rounds: int,
    console: Console,
) -> BenchReport:
    """Let the variants take turns `rounds` times; the console shows how far it is."""
    machine = describe_machine()  # before: the load is then that of others
    turns = {variant.name: variant.run for variant in variants}
    measurements = take_turns(benchmark, turns, rounds, console)
    return BenchReport(benchmark, settings, machine, variants, measurements, ratios, notes)


Measured = TypeVar("Measured", bound=Measurement)


def take_turns(
    benchmark: str, variants: Mapping[str, Callable[[], Measured]], rounds: int, console: Console
) -> dict[str, list[Measured]]:
    """Call each variant once a round, `rounds` times; returns what each measured, by name."""
    measurements: dict[str, list[Measured]] = {name: [] for name in variants}
    turns = [(number, name) for number in range(rounds) for name in variants]
    with StepProgress(console, f"Measuring {benchmark}", len(turns)) as progress:
        for done, (number, name) in enumerate(turns):
            progress.show(done, f"round {number + 1} of {rounds}, {name}")
            measurements[name].append(variants[name]())
    return measurements


def measure(work: Callable[[], int]) -> Measurement:
    """Time one call of `work`, which returns the tokens that it processed."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    tokens = work()
    return Measurement(tokens, time.perf_counter() - wall, cpu_seconds() - cpu)


def for_seconds(seconds: float, step: Callable[[], int]) -> Callable[[], Measurement]:
    """Make a repetition that calls `step` (returns its tokens) until `seconds` of wall time are over.

    The first call of all is not timed: it opens files, and fills caches.
    """
    warm = False

    def work() -> int:
        tokens, end = 0, time.perf_counter() + seconds
        while time.perf_counter() < end:
            tokens += step()
        return tokens

    def run() -> Measurement:
        nonlocal warm
        if not warm:
            step()
            warm = True
        return measure(work)

    return run


def in_own_process(function: str, arguments: dict[str, Any], variables: dict[str, str] | None = None) -> Measurement:
    """Call `module:function(**arguments)` in a fresh process and return the Measurement that it returns.

    Args:
        arguments: as plain JSON.
        variables: added to the environment.

    Raises:
        MaskwrightError: when the process fails, with what it said last.
    """
    return Measurement(**in_own_processes(function, arguments, [variables or {}]))


def in_own_processes(function: str, arguments: dict[str, Any], variables: Sequence[dict[str, str]]) -> dict[str, Any]:
    """Call `module:function(**arguments)` in a fresh process for each of `variables`, all at once.

    Returns:
        What the first process returned, a dataclass, as plain JSON.

    Raises:
        MaskwrightError: when one of them fails, with what it said last; the others are then ended.
    """
    command = [sys.executable, "-m", "tools.bench.own_process", function, json.dumps(arguments)]
    with tempfile.TemporaryDirectory(prefix="maskwright-bench-") as folder, ExitStack() as stack:
        said = [(Path(folder, f"out-{number}"), Path(folder, f"err-{number}")) for number in range(len(variables))]
        processes = [
            subprocess.Popen(
                command,
                env={**os.environ, **own},
                stdout=stack.enter_context(open(out, "w")),
                stderr=stack.enter_context(open(err, "w")),
                preexec_fn=make_die_with_parent(),  # whatever ends the benchmark, nobody measures on
            )
            for own, (out, err) in zip(variables, said, strict=True)
        ]
        try:
            failed = _wait(processes)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if failed is not None:
            raise MaskwrightError(
                f"The variant {function.rpartition(':')[2]} failed with exit code {processes[failed].returncode}.",
                where=" ".join(f"{name}={value}" for name, value in arguments.items()),
                remedy="It said: " + (said[failed][1].read_text(errors="replace").strip() or "nothing")[-2000:],
            )
        return json.loads(said[0][0].read_text().splitlines()[-1])


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Wait until all have ended well, or one has not: its number."""
    while True:
        codes = [process.poll() for process in processes]
        failed = next((number for number, code in enumerate(codes) if code), None)
        if failed is not None or None not in codes:
            return failed
        time.sleep(0.02)


def markdown_table(table: Sequence[Sequence[str]]) -> str:
    """Write rows, of which the first is the head, as a table in Markdown."""
    head, *rows = table
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _speed(measured: Measurement, by: str) -> float:
    return measured.tokens / max(measured.cpu_seconds if by == "cpu" else measured.wall_seconds, 1e-9)


def _millions(speed: float) -> str:
    millions = speed / 1e6
    return f"{millions:,.0f}" if millions >= 100 else f"{millions:.1f}" if millions >= 10 else f"{millions:.2f}"
