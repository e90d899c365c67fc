"""`maskwright doctor --job RUN`: one process on each node of a job looks at it, and the first one judges all of them.

Each node tells what it found through a store that the first one serves. A node that has told nothing in time is named
as well, so nothing here waits for ever; and only the first one's exit code says anything.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from tools.doctor.judge import NodeFacts, judge
from tools.doctor.lines import DoctorReport, Line, checked
from tools.doctor.machine import (
    check_devices,
    check_interface,
    check_space,
    check_writing,
    devices,
    interface,
    versions,
)
from tools.doctor.run import check_config
from tools.doctor.traffic import measure_traffic
from trainer.config.file import load_config
from trainer.errors import EXIT_UNEXPECTED
from trainer.runtime.files import replace_synced, unique_token
from trainer.runtime.rendezvous import naming_a_taken_port

PREFLIGHT = "preflight.json"
ANSWER_S = 180.0
"""How long the first node waits for the others: they import torch, perhaps from a slow file system."""
EXCHANGE_S = 60.0
"""How long what the nodes do together may take."""
_FILE_APPEARS_S = 10.0


@dataclass(frozen=True)
class NodePlace:
    """A node among those of the job.

    Attributes:
        names: of all nodes, in the order of their ranks.
        address, port: where the first one serves the store.
    """

    rank: int
    names: Sequence[str]
    address: str
    port: int


class Exchange:
    """What the nodes tell each other, as JSON under names in the store."""

    def __init__(self, place: NodePlace, answer_s: float) -> None:
        import torch.distributed as dist

        self.place = place
        count, timeout = len(place.names), timedelta(seconds=answer_s)
        with naming_a_taken_port(place.address, place.port):
            self.store: Any = dist.TCPStore(  # type: ignore[attr-defined]  # it is documented, and not in __all__
                place.address, place.port, count, place.rank == 0, timeout, wait_for_workers=False
            )

    def tell(self, topic: str, value: Any) -> None:
        """Say something to the first node, as this node."""
        self.store.set(f"{topic}/{self.place.rank}", json.dumps(value))

    def announce(self, topic: str, value: Any) -> None:
        """Say something to all nodes, as the first one."""
        self.store.set(topic, json.dumps(value))

    def hear(self, topic: str, seconds: float) -> Any:
        """Wait for what the first node announces and return it; torch raises an error when it is not in time."""
        self.store.wait([topic], timedelta(seconds=seconds))
        return json.loads(self.store.get(topic))

    def collect(self, topic: str, ranks: Sequence[int], seconds: float) -> dict[int, Any]:
        """Collect what these ranks tell within `seconds`, by rank."""
        deadline, told = time.monotonic() + seconds, dict[int, Any]()
        while True:
            for rank in ranks:
                if rank not in told and self.store.check([f"{topic}/{rank}"]):
                    told[rank] = json.loads(self.store.get(f"{topic}/{rank}"))
            if len(told) == len(ranks) or time.monotonic() > deadline:
                return told
            time.sleep(0.05)


def examine_job(run_dir: Path, place: NodePlace, answer_s: float = ANSWER_S) -> DoctorReport | None:
    """Look at this node together with all others; every node calls it.

    Returns:
        the report, on the first node, which also writes RUN/preflight.json; None on the others.
    """
    # Whatever hangs, such as a file system, does not hold up the job for ever.
    guard = threading.Timer(2 * answer_s + 3 * EXCHANGE_S, os._exit, (EXIT_UNEXPECTED,))
    guard.daemon = True
    guard.start()
    try:
        if place.rank == 0:
            return _lead(run_dir, Exchange(place, answer_s), answer_s)
        try:
            _follow(run_dir, Exchange(place, answer_s), answer_s)
        except RuntimeError as error:  # the first node names this one, which has not answered
            where = f"{place.address}:{place.port}"
            print(f"{place.names[place.rank]} has no answer from the first node at {where}: {error}", file=sys.stderr)
        return None
    finally:
        guard.cancel()


def _lead(run_dir: Path, exchange: Exchange, answer_s: float) -> DoctorReport:
    names = exchange.place.names
    token = f".preflight-{unique_token()}"
    folder = run_dir / token
    folder.mkdir(parents=True, exist_ok=True)
    try:
        exchange.announce("token", token)
        exchange.tell("facts", _look(run_dir, folder, exchange.place))
        facts = exchange.collect("facts", range(len(names)), answer_s)
        alive = sorted(facts)
        has_gpus = all(fact["devices"] for fact in facts.values())
        exchange.announce("alive", {"ranks": alive, "backend": "nccl" if has_gpus else "gloo"})
        _do_together(folder, exchange, answer_s)
        together = exchange.collect("together", alive, 2 * EXCHANGE_S)
        found = {
            rank: NodeFacts(**{**facts[rank], **together.get(rank, {})}, took_part=rank in together) for rank in alive
        }
        report = judge(names, found, answer_s)
        content = {**report.to_dict(), "nodes": list(names), "time": time.time()}
        replace_synced(run_dir / PREFLIGHT, (json.dumps(content, indent=1) + "\n").encode())
        return report
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _follow(run_dir: Path, exchange: Exchange, answer_s: float) -> None:
    folder = run_dir / exchange.hear("token", answer_s)
    exchange.tell("facts", _look(run_dir, folder, exchange.place))
    _do_together(folder, exchange, answer_s)


def _look(run_dir: Path, folder: Path, place: NodePlace) -> dict[str, Any]:
    """Find out what this node can by itself, and leave a file for the others to see."""
    found, network = devices(), interface()
    lines = checked("devices", partial(check_devices, found))
    lines += checked("disk", partial(check_space, run_dir))
    lines += checked("writing", partial(check_writing, run_dir))
    lines += checked("network", partial(check_interface, network))
    lines += checked("data", partial(_check_data, run_dir))
    with contextlib.suppress(OSError):  # the folder is not shared, or cannot be written: the others will not see it
        folder.mkdir(exist_ok=True)
        (folder / str(place.rank)).write_text(folder.name)
    return {
        "versions": versions(),
        "devices": found,
        "interface": network,
        "lines": [dataclasses.asdict(line) for line in lines],
    }


def _check_data(run_dir: Path) -> list[Line]:
    """Check what the run's config names, where it has one already."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        return [Line("ok", "data", f"not looked at: there is no {path}")]
    return [Line("ok", "data", line.finding) for line in check_config(load_config(path))]


def _do_together(folder: Path, exchange: Exchange, answer_s: float) -> None:
    """Measure what takes several nodes: whose files this one sees, what time it is, and how fast they talk."""
    told = exchange.hear("alive", 2 * answer_s)
    now, alive = time.time(), told["ranks"]  # all hear it at the same moment, to some hundredths of a second
    if exchange.place.rank not in alive:
        return
    seen, deadline = set[int](), time.monotonic() + _FILE_APPEARS_S
    while len(seen) < len(alive) and time.monotonic() < deadline:
        seen |= {rank for rank in alive if rank not in seen and _is_there(folder / str(rank), folder.name)}
        time.sleep(0.05)
    traffic = measure_traffic(exchange.store, alive.index(exchange.place.rank), len(alive), told["backend"], EXCHANGE_S)
    exchange.tell("together", {"told_at": now, "seen": sorted(seen), "traffic": dataclasses.asdict(traffic)})


def _is_there(path: Path, content: str) -> bool:
    """Tell whether the file is there, by opening it: a network file system may cache an old list of the folder."""
    try:
        return path.read_text() == content
    except OSError:
        return False
