"""`maskwright status`: where a run stands, from the small files in its folder. No torch, so that it answers at once."""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from trainer.errors import UserError
from trainer.liveness.heartbeat import Heartbeat, read_heartbeats
from trainer.runtime.paths import user_path
from trainer.runtime.plain_text import listed
from trainer.runtime.process import has_process
from trainer.runtime.streams import reader_has_left
from trainer.runtime.typed_json import as_type
from trainer.tracking.jsonl import read_last
from trainer.tracking.status import ENDED, Status, read_status

SILENCE_S = 60.0
"""Ranks that have given no sign of life for so long, and some heartbeats more, look dead."""
GONE_S = 5.0
"""On this machine the process tells sooner; but its number may be of another namespace, a container's."""
STARTING_S = 600.0
"""Without any heartbeat: a rank may be reading its inputs from a slow file system."""
WATCH_INTERVAL_S = 2.0
_RANKS_READ = 512  # of more, evenly spread ones: each is a file on a shared disk
_RANKS_NAMED = 4


@dataclass(frozen=True)
class RunView:
    """What is known of a run.

    Attributes:
        status: made up from other files where the run has written none (`has_status`).
        heartbeat_age_seconds: of the youngest one, since it was given; None without heartbeats.
        silent: ranks that look dead while others are alive.
        death: why the whole run looks dead though its state says otherwise; empty when it does not.
    """

    run_dir: Path
    status: Status
    has_status: bool
    heartbeat_age_seconds: float | None
    silent: list[str]
    death: str

    @property
    def ended(self) -> bool:
        return self.has_status and self.status.state in ENDED

    @property
    def state(self) -> str:
        return self.status.state if self.has_status else "unknown"

    def to_dict(self) -> dict[str, Any]:
        return {
            "run": str(self.run_dir),
            **asdict(self.status),
            "state": self.state,
            "heartbeat_age_seconds": self.heartbeat_age_seconds,
            "silent_ranks": self.silent,
            "looks_dead": bool(self.death),
            "death": self.death,
        }


def show_status(run: str, watch: bool, as_json: bool, console: Console) -> None:
    """Print the status of a run, once, or again and again until it has ended.

    Raises:
        UserError: when there is no run in that folder.
    """
    if not watch:
        _print(look_at(run), as_json, console)
    elif as_json or not console.is_terminal:
        for view in _until_it_ends(run):
            _print(view, as_json, console)
    else:
        with Live(console=console, auto_refresh=False) as live:
            for view in _until_it_ends(run):
                live.update("\n".join(status_lines(view)), refresh=True)


def _until_it_ends(run: str) -> Iterator[RunView]:
    """Look every few seconds and give what has changed, up to the end of the run or until nobody reads it."""
    before: dict[str, Any] | None = None
    while True:
        view = look_at(run)
        now = {name: value for name, value in view.to_dict().items() if not name.endswith(("_age_seconds", "_at"))}
        if now != before:
            yield view
        if view.ended or reader_has_left(sys.stdout):
            return
        before = now
        time.sleep(WATCH_INTERVAL_S)


def _print(view: RunView, as_json: bool, console: Console) -> None:
    if as_json:
        print(json.dumps(view.to_dict()), flush=True)
    else:
        console.print("\n".join(status_lines(view)))


def look_at(run: str) -> RunView:
    """Read what a run folder tells.

    Raises:
        UserError: when there is no run in it.
    """
    run_dir = user_path(run)
    if not any((run_dir / name).exists() for name in ("status.json", "metrics.jsonl", "config.yaml", "checkpoints")):
        raise UserError(
            f"There is no run in '{run_dir}'.", where=run, remedy="Give a run folder: the run.dir of a run's config."
        )
    found = read_status(run_dir)
    status = found or _status_from_other_files(run_dir)
    ranks = range(0, status.world_size, max(1, status.world_size // _RANKS_READ))
    beats = read_heartbeats(run_dir, ranks)
    beats = {rank: beat for rank, beat in beats.items() if beat.time >= status.started_at - SILENCE_S}
    if found is None or status.state in ENDED:
        return RunView(run_dir, status, found is not None, _age(beats), [], "")
    return _judge(run_dir, status, beats)


def _judge(run_dir: Path, status: Status, beats: dict[int, Heartbeat]) -> RunView:
    """Judge whether a run that has not ended is alive."""
    now, death, silent = time.time(), "", []
    age = _age(beats)
    dead = [beat for beat in beats.values() if now - beat.time > SILENCE_S + 3 * beat.interval_seconds]
    unheard = now - status.updated_at if age is None else age
    if unheard > GONE_S and status.host == socket.gethostname() and not has_process(status.pid):
        death = f"process {status.pid} of rank 0 is gone"
    elif beats and len(dead) == len(beats):
        death = f"no rank has given a sign of life for {timedelta(seconds=round(age or 0))}"
    elif not beats and unheard > STARTING_S:
        death = f"nothing has been heard for {timedelta(seconds=round(unheard))}"
    elif dead:
        silent = [f"rank {beat.rank} on {beat.node} for {timedelta(seconds=round(now - beat.time))}" for beat in dead]
    return RunView(run_dir, status, True, age, silent, death)


def _age(beats: dict[int, Heartbeat]) -> float | None:
    return max(0.0, time.time() - max(beat.time for beat in beats.values())) if beats else None


def _status_from_other_files(run_dir: Path) -> Status:
    """Read from metrics and checkpoints what they tell of a run that has no status: an older version's."""
    line = read_last(run_dir / "metrics.jsonl", "train/loss") or {}
    saved = sorted(path.parent.name for path in (run_dir / "checkpoints").glob("step-*/manifest.json"))
    facts = {
        "step": line.get("step"),
        "samples": line.get("samples"),
        "tokens": line.get("tokens"),
        "train_loss": line.get("train/loss"),
        "tokens_per_second": line.get("throughput/tokens_per_second"),
        "last_checkpoint": saved[-1] if saved else "",
        "updated_at": line.get("time"),
    }
    try:
        return as_type(Status, {name: value for name, value in facts.items() if value is not None})
    except ValueError:  # numbers that no run has written
        return Status(last_checkpoint=str(facts["last_checkpoint"]))


def status_lines(view: RunView) -> list[str]:
    """Write the lines for a person."""
    status = view.status
    state = f"{view.state} ({status.reason})" if status.reason else view.state
    if not view.has_status:
        state = "unknown: the run has written no status.json"
    rows = [
        ("state", f"{state}{', BUT IT LOOKS DEAD: ' + view.death if view.death else ''}"),
        ("step", _progress(status)),
        ("tokens", f"{status.tokens:,}"),
        ("loss", "" if status.train_loss is None else f"{status.train_loss:.4f}"),
        ("speed", "" if status.tokens_per_second is None else f"{status.tokens_per_second:,.0f} tokens/s"),
        ("time left", "" if status.eta_seconds is None else str(timedelta(seconds=round(status.eta_seconds)))),
        ("best", _best(status)),
        ("checkpoint", status.last_checkpoint or "none yet"),
        ("branch", _branch(status)),
        ("restarts", str(status.restarts) if view.has_status else ""),
        ("job", status.job_id),
        ("nodes", ", ".join(status.nodes)),
        ("ranks", str(status.world_size) if status.world_size else ""),
        ("heartbeat", _heartbeat(view)),
        ("silent", listed(view.silent, _RANKS_NAMED, "; ")),
        ("updated", str(datetime.fromtimestamp(round(status.updated_at))) if status.updated_at else ""),
    ]
    return [str(view.run_dir), *(f"  {name:<11} {text}" for name, text in rows if text)]


def _progress(status: Status) -> str:
    if not status.total_steps:
        return f"{status.step:,}"
    return f"{status.step:,}/{status.total_steps:,} ({status.step / status.total_steps:.1%})"


def _best(status: Status) -> str:
    """Name the evaluation with the lowest loss."""
    return (
        ""
        if status.best_loss is None or status.best_step is None
        else f"step {status.best_step:,}, eval/loss {status.best_loss:.4f}"
    )


def _branch(status: Status) -> str:
    """Name the run and the step that it began from, if it is another run's."""
    if not status.branch_of:
        return ""
    checkpoint = Path(status.branch_of)
    step = checkpoint.name.removeprefix("step-")
    return f"of {checkpoint.parent.parent} at step {int(step):,}" if step.isdecimal() else f"of {checkpoint}"


def _heartbeat(view: RunView) -> str:
    if view.heartbeat_age_seconds is None:
        return ""
    return f"{timedelta(seconds=round(view.heartbeat_age_seconds))} old"
