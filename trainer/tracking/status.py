"""RUN/status.json: where a run stands, in one small file. Rank 0 keeps it; people, scripts and job scripts read it.

No torch: what starts, watches or refuses a run uses it too (`change_status`). It is replaced as a whole, but not
synced: a status is worth no wait for the disk, and a disk that is full costs the status, not the run.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from trainer.errors import EXIT_FINISHED, DivergedError, MaskwrightError
from trainer.runtime.files import unique_name
from trainer.runtime.paths import real_path, user_path
from trainer.runtime.process import job_id
from trainer.runtime.side_files import read_record
from trainer.runtime.typed_json import Count, Number, Pid, Seconds
from trainer.state import TrainState

logger = logging.getLogger(__name__)
STATUS = "status.json"
AT_ONCE = "a second Ctrl-C: at once, without saving"
STEP_INTERVAL_S = 2.0
"""Progress within training is written this often at most; another state at once."""

State = Literal["starting", "training", "evaluating", "saving", "finished", "stopped", "diverged", "failed"]
_STATES: dict[str, State] = {
    "prepare": "starting",
    "start": "starting",
    "data": "training",
    "evaluate": "evaluating",
    "save": "saving",
}
ENDED: tuple[State, ...] = ("finished", "stopped", "diverged", "failed")


@dataclass(frozen=True)
class Status:
    """Where a run stands.

    Attributes:
        state: starting, training, evaluating or saving; finished, stopped (the same command goes on), diverged, failed.
        reason: why it is in that state, where there is more to say.
        step: optimizer steps done.
        total_steps: of the whole run; null before that is known.
        samples: blocks consumed.
        tokens: positions consumed.
        train_loss: of the last training line, nats; null before the first, and when it is not finite.
        tokens_per_second: of the last training line.
        eta_seconds: time left at that speed.
        best_step: of the evaluation with the lowest loss so far; null before the first.
        best_loss: what it found, nats.
        last_checkpoint: the folder in `checkpoints/` that was saved or resumed from last.
        branch_of: the checkpoint of another run that this one began from; empty where it did not.
        restarts: starts of this run after the first one.
        job_id: the SLURM job; empty outside SLURM.
        nodes: names of the machines, in the order of their ranks.
        world_size: ranks.
        host: where rank 0 runs.
        pid: of rank 0 there.
        started_at: of this start, seconds since 1970.
        updated_at: when this was written, seconds since 1970.
    """

    state: State = "starting"
    reason: str = ""
    step: Count = 0
    total_steps: Count | None = None
    samples: Count = 0
    tokens: Count = 0
    train_loss: Number | None = None
    tokens_per_second: Number | None = None
    eta_seconds: Seconds | None = None
    best_step: Count | None = None
    best_loss: Number | None = None
    last_checkpoint: str = ""
    branch_of: str = ""
    restarts: Count = 0
    job_id: str = ""
    nodes: tuple[str, ...] = ()
    world_size: Count = 0
    host: str = ""
    pid: Pid = 0
    started_at: Seconds = 0.0
    updated_at: Seconds = 0.0


def read_status(run_dir: Path) -> Status | None:
    """Read the status of a run; None where there is none, or it cannot be understood."""
    return read_record(run_dir / STATUS, Status)


def settle_resume(run_dir: Path, resume: str) -> str:
    """Return what `--resume` asks for: auto where it names the checkpoint that a run has begun from and gone on since.

    So the same command goes on with a branch as with any run, without doing again what is saved.
    """
    status = read_status(run_dir)
    if resume in ("auto", "must", "never") or status is None or not status.branch_of:
        return resume
    trunk, named = Path(status.branch_of), real_path(user_path(resume, "--resume"))
    is_same = named in (trunk, trunk.parent.parent)
    return "auto" if is_same and any((run_dir / "checkpoints").glob("step-*/manifest.json")) else resume


def _write(run_dir: Path | None, status: Status) -> None:
    """Replace the file; a warning in the log where that is not possible. None: there is none."""
    if run_dir is None:
        return
    path = run_dir / STATUS
    temporary = unique_name(path)
    content = json.dumps(asdict(status), indent=1) + "\n"
    try:
        temporary.write_text(content, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        logger.warning("%s is not written: %s", path, error.strerror)
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def change_status(run_dir: Path, **changes: Any) -> None:
    """Change fields of RUN/status.json, such as `state="failed", reason="..."`; nobody else may be writing it.

    For what happens outside the ranks: before they start, or when they can no longer say anything.
    """
    _write(run_dir, replace(read_status(run_dir) or Status(), **changes, updated_at=time.time()))


class StatusWriter:
    """Rank 0's hand on RUN/status.json, from one start to its end.

    Args:
        run_dir: None for a hand that writes nothing: of another rank, or of a dry run.
    """

    def __init__(self, run_dir: Path | None, nodes: Sequence[str], world_size: int) -> None:
        self._run_dir = run_dir
        self._before = read_status(run_dir) if run_dir is not None else None
        before = self._before or Status()
        self._status = replace(
            before,
            state="starting",
            reason="",
            tokens_per_second=None,
            eta_seconds=None,
            restarts=before.restarts + (self._before is not None),
            job_id=job_id(),
            nodes=tuple(nodes),
            world_size=world_size,
            host=socket.gethostname(),
            pid=os.getpid(),
            started_at=time.time(),
        )
        self._last_write = 0.0
        self.set()

    def set(self, **changes: Any) -> None:
        """Change fields, and write all of it."""
        self._status = replace(self._status, **changes, updated_at=time.time())
        self._last_write = time.monotonic()
        _write(self._run_dir, self._status)

    def progress(self, **changes: Any) -> None:
        """Change fields; they are written with the next state, or when the last write is long enough ago."""
        self._status = replace(self._status, **changes)
        if time.monotonic() - self._last_write >= STEP_INTERVAL_S:
            self.set()

    def start(
        self, state: TrainState, total_steps: int, checkpoint: Path | None, is_new: bool, is_branch: bool = False
    ) -> None:
        """Note that training starts from `state`.

        Args:
            checkpoint: whose state it is; None at step 0.
            is_new: an earlier run in this folder is left behind, and with it its restarts.
            is_branch: whether the checkpoint is another run's.
        """
        changes: dict[str, Any] = {"restarts": 0} if is_new else {}
        changes |= {"train_loss": None, "branch_of": ""} if checkpoint is None else {}
        changes |= {"branch_of": str(real_path(checkpoint))} if checkpoint is not None and is_branch else {}
        name = "" if checkpoint is None else checkpoint.name
        self.set(total_steps=total_steps, last_checkpoint=name, **changes, **_counters(state), **best_of(state))

    def entered(self, phase: str) -> None:
        """Note that a phase of the run begins (trainer.liveness.activity)."""
        state = _STATES.get(phase)
        if state is not None and state != self._status.state:
            self.set(state=state)

    def take_back(self) -> None:
        """Put the status of before back: this start has changed nothing."""
        if self._before is not None:
            _write(self._run_dir, self._before)

    def ended(self, code: int, reason: str, state: TrainState | None = None) -> None:
        """Note that the run ends in order, with this exit code and in this state, if there was any training."""
        name = "finished" if code == EXIT_FINISHED else "stopped"
        of_state = {} if state is None else {**_counters(state), **best_of(state)}
        self.set(state=name, reason=reason, eta_seconds=None, **of_state)

    @contextlib.contextmanager
    def until_the_end(self) -> Iterator[None]:
        """Record what escapes as the reason why the run ends."""
        try:
            yield
        except KeyboardInterrupt:
            self.set(state="stopped", reason=AT_ONCE, eta_seconds=None)
            raise
        except BaseException as error:
            reason = error.problem if isinstance(error, MaskwrightError) else f"{type(error).__name__}: {error}"
            state = "diverged" if isinstance(error, DivergedError) else "failed"
            self.set(state=state, reason=reason, eta_seconds=None)
            raise


def _counters(state: TrainState) -> dict[str, int]:
    return {"step": state.step, "samples": state.samples, "tokens": state.tokens}


def best_of(state: TrainState) -> dict[str, Any]:
    """Name the best evaluation up to a state, in the fields of Status."""
    return {"best_step": state.best_step, "best_loss": state.best_loss}
