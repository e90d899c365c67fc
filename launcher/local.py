"""The ranks of this machine: started together, watched, and ended together.

A rank lives in its own session, so that a Ctrl-C on the terminal reaches the launcher alone, which forwards it to
each rank exactly once. The kernel kills the ranks if the launcher dies (PR_SET_PDEATHSIG), and a rank's loader
workers are killed with it: nothing outlives the command.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from launcher.console import EXIT_INTERRUPTED, ErrorCard, print_card
from launcher.environment import Membership
from launcher.rank import ERROR_FILE_VARIABLE, ErrorReport, describe_rank, ended_file, find_log, print_report
from trainer.errors import EXIT_FINISHED, EXIT_STOPPED_AFTER_SAVING, EXIT_UNEXPECTED
from trainer.runtime.process import make_die_with_parent
from trainer.runtime.rendezvous import LISTENER_VARIABLE, LOCALHOST, listen, listen_for_nodes
from trainer.runtime.signals import STOP_SIGNALS
from trainer.tracking.status import AT_ONCE, change_status, read_status

GRACE_S = 15.0
"""After a rank has failed, the others have this long to end by themselves, and again this long after a TERM."""
POLL_S = 0.1
_TAIL_BYTES = 4096


@dataclass
class RankProcess:
    rank: int
    process: subprocess.Popen[bytes]
    error_file: Path
    output_file: Path | None
    """Where stdout and stderr go; None for the first rank, which has the console."""
    last_seen_alive: float
    ended_by_launcher: bool = False

    @property
    def failed(self) -> bool:
        """Whether it has ended, and not well: with the right code, and with its work done."""
        code = self.process.returncode
        if code in (EXIT_FINISHED, EXIT_STOPPED_AFTER_SAVING):
            return not ended_file(self.error_file).exists()
        return code is not None

    def poll(self) -> bool:
        """Tell whether it has ended.

        Its process group is killed before the pid is given back, so it is surely its own.
        """
        if self.process.returncode is not None:
            return True
        now = time.time()  # before the look: it may be killed, and others report that, between the two
        if os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            self.last_seen_alive = now
            return False
        self._kill_group()
        self.process.wait()
        return True

    def send(self, number: signal.Signals) -> None:
        if self.process.returncode is None:
            os.kill(self.process.pid, number)  # not Popen.send_signal: that could take its exit status

    def is_stopped(self) -> bool:
        """Tell whether it stands still by SIGSTOP or the like: it cannot end by itself then, nor by TERM."""
        if self.process.returncode is not None:
            return False
        try:
            return Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
        except OSError:  # no such file system, or gone
            return False

    def terminate(self) -> None:
        self.ended_by_launcher = True
        self.send(signal.SIGTERM)

    def kill(self) -> None:
        """Kill it with its workers, and wait until it is gone."""
        if self.process.returncode is None:
            self.ended_by_launcher = True
            self._kill_group()
            self.process.wait()

    def _kill_group(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


@dataclass(frozen=True)
class Nodes:
    """This machine among several, each of which has a launcher that starts equally many ranks.

    Attributes:
        master_address: of the first one, as all reach it.
        master_port: where its rank 0 meets the others.
    """

    count: int
    index: int
    master_address: str
    master_port: int


def launch(
    command: Sequence[str],
    process_count: int,
    run_dir: Path | None,
    grace_s: float = GRACE_S,
    nodes: Nodes | None = None,
) -> int:
    """Run `command` once a rank, with RANK, WORLD_SIZE and the like set, and return the exit code of the whole.

    Of several nodes these are the ranks of this one. `command` does its work in `run_rank`, which leaves word that it
    was done. The code is 0 or 75 when every rank ended well with one of them (75 if any did), 130 after a second
    Ctrl-C, else that of the rank that failed first, whose error is shown. A death by signal counts as 1.
    """
    with tempfile.TemporaryDirectory(prefix="maskwright-") as scratch, _received_signals() as received:
        ranks = _start(command, process_count, Path(scratch), nodes)
        try:
            interrupted = _watch(ranks, received, grace_s)
        finally:
            for rank in ranks:
                rank.kill()
        if interrupted:
            print("Interrupted.", file=sys.stderr)
            _tell_status(run_dir, ranks, state="stopped", reason=AT_ONCE)
            return EXIT_INTERRUPTED
        if not any(rank.failed for rank in ranks):
            return max(rank.process.returncode for rank in ranks)
        code = _show_first_cause(ranks, run_dir)
        if nodes is not None and code == EXIT_UNEXPECTED:
            print("If it only lost another rank, the cause is with the launcher of that one's node.", file=sys.stderr)
        return code


def core_count() -> int:
    """Count the cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def local_membership(rank: int, world_size: int, port: int) -> Membership:
    return Membership("local", rank, world_size, rank, world_size, LOCALHOST, port)


@contextmanager
def _received_signals() -> Iterator[deque[signal.Signals]]:
    """Collect signals instead of dying from them."""
    received: deque[signal.Signals] = deque()

    def handle(number: int, _frame: FrameType | None) -> None:
        received.append(signal.Signals(number))

    previous = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _start(command: Sequence[str], process_count: int, scratch: Path, nodes: Nodes | None) -> list[RankProcess]:
    threads = max(1, core_count() // process_count)
    die_with_parent = make_die_with_parent()

    def prepare() -> None:
        die_with_parent()
        signal.pthread_sigmask(
            signal.SIG_BLOCK, STOP_SIGNALS
        )  # until it can handle them, in Python's own start as well

    ranks: list[RankProcess] = []
    listener, memberships = _places(process_count, nodes)
    try:
        for membership in memberships:
            rank = membership.rank
            error_file = scratch / f"rank-{rank:05d}.error.json"
            output_file = scratch / f"rank-{rank:05d}.out" if rank else None
            environ = {"OMP_NUM_THREADS": str(threads), **os.environ, ERROR_FILE_VARIABLE: str(error_file)}
            environ |= membership.variables()
            environ[LISTENER_VARIABLE] = "" if rank or listener is None else str(listener.fileno())
            output = open(output_file, "wb") if output_file else None
            process = subprocess.Popen(
                command,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                start_new_session=True,
                preexec_fn=prepare,
                pass_fds=() if rank or listener is None else (listener.fileno(),),
            )
            if output:
                output.close()
            ranks.append(RankProcess(rank, process, error_file, output_file, last_seen_alive=time.time()))
    except BaseException:
        for rank in ranks:
            rank.kill()
        raise
    finally:
        if listener is not None:
            listener.close()  # rank 0 has it
    return ranks


def _places(process_count: int, nodes: Nodes | None) -> tuple[socket.socket | None, list[Membership]]:
    """Open the socket for rank 0, where that is on this node, and list the places of the ranks of this node.

    Raises:
        UserError: when another process has the port.
    """
    if nodes is None:
        listener = listen()
        port = listener.getsockname()[1]
        return listener, [local_membership(rank, process_count, port) for rank in range(process_count)]
    listener = listen_for_nodes(nodes.master_port) if nodes.index == 0 else None
    memberships = [
        Membership(
            started_by="local",
            rank=nodes.index * process_count + local_rank,
            world_size=nodes.count * process_count,
            local_rank=local_rank,
            local_world_size=process_count,
            master_address=nodes.master_address,
            master_port=nodes.master_port,
        )
        for local_rank in range(process_count)
    ]
    return listener, memberships


def _watch(ranks: list[RankProcess], received: deque[signal.Signals], grace_s: float) -> bool:
    """Wait until every rank has ended, forwarding signals; True when they are to end at once.

    A second Ctrl-C asks for that, and so does one that met a rank which had nothing to save yet and died of it.
    """
    interrupts = 0
    failed_at: float | None = None
    terminated = False
    while sum(rank.poll() for rank in ranks) < len(ranks):  # polls every one of them
        while received:
            number = received.popleft()
            interrupts += number == signal.SIGINT
            if interrupts > 1:
                return True
            for rank in ranks:
                rank.send(number)
        if any(rank.process.returncode == -signal.SIGINT for rank in ranks):
            return True
        now = time.monotonic()
        if failed_at is None and any(rank.failed for rank in ranks):
            failed_at = now
        if failed_at is not None:
            for rank in ranks:
                if rank.is_stopped():
                    rank.kill()
        if failed_at is not None and now >= failed_at + 2 * grace_s:
            for rank in ranks:
                rank.kill()
        elif failed_at is not None and now >= failed_at + grace_s and not terminated:
            terminated = True
            for rank in ranks:
                if rank.process.returncode is None:
                    rank.terminate()
        time.sleep(POLL_S)
    return any(rank.process.returncode == -signal.SIGINT for rank in ranks)


def _show_first_cause(ranks: list[RankProcess], run_dir: Path | None) -> int:
    """Show why the first rank failed, and return its exit code."""
    failed = [rank for rank in ranks if rank.failed]
    reports = {rank.rank: ErrorReport.read(rank.error_file) for rank in failed}
    first = min(failed, key=lambda rank: _order_of_failure(rank, reports[rank.rank]))
    report = reports[first.rank]
    if report is not None:
        print_report(report)
        if report.exit_code == EXIT_UNEXPECTED:  # rank 0 may have told what it met itself
            _tell_status(run_dir, ranks, state="failed", reason=report.problem)
        return report.exit_code
    problem = _show_silent_end(first, find_log(run_dir, first.rank))
    _tell_status(run_dir, ranks, state="failed", reason=problem)
    return max(first.process.returncode, EXIT_UNEXPECTED)


def _order_of_failure(rank: RankProcess, report: ErrorReport | None) -> tuple[int, bool, float]:
    """Return a sort key: ranks wait for each other, so one failure makes others fail, and the earliest is the cause.

    A rank killed by a signal left no report, and its peers then report lost connections: it counts as of when it was
    last seen alive. An error that arose on another rank is that rank's to tell, with its traceback. A rank that left
    with neither counts only when there is nothing better, one that we ended last.
    """
    if report is not None:
        return 0, not report.is_own, report.timestamp
    if rank.ended_by_launcher:
        return 2, False, rank.last_seen_alive
    return (0 if rank.process.returncode < 0 else 1), False, rank.last_seen_alive


def _tell_status(run_dir: Path | None, ranks: list[RankProcess], state: str, reason: str) -> None:
    """Write into RUN/status.json how the ranks ended, if it is rank 0 of these that it speaks of."""
    status = read_status(run_dir) if run_dir is not None else None
    owner = (socket.gethostname(), next((rank.process.pid for rank in ranks if rank.rank == 0), None))
    if run_dir is not None and status is not None and (status.host, status.pid) == owner:
        change_status(run_dir, state=state, reason=reason, eta_seconds=None)


def _show_silent_end(rank: RankProcess, log: str) -> str:
    """Show what a rank that left no report printed last, and how it ended; return how it ended."""
    if rank.output_file:
        sys.stderr.write(_tail(rank.output_file))
    code = rank.process.returncode
    if code >= 0:
        problem = f"rank {rank.rank} ended with exit code {code} and left no report."
        remedy = "Read what it printed above, and its log."
    else:
        problem = f"rank {rank.rank} was killed by {_signal_name(-code)}."
        remedy = (
            "If nobody killed it, the machine ran out of memory (see dmesg): lower batch.micro_size or data.workers."
            if -code == signal.SIGKILL
            else "Read what it printed above, and its log."
        )
    print_card(ErrorCard("Unexpected end", problem, describe_rank(rank.rank, log), remedy))
    return problem


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _tail(path: Path) -> str:
    with open(path, "rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - _TAIL_BYTES))
        return file.read().decode(errors="replace")
