"""A real SLURM of two nodes on this machine: munged, slurmctld and two slurmd, in a temporary folder.

Everything is the cluster's own: key, sockets, ports, state. Nothing of an installed SLURM is read or touched, and it
runs as root as well as under a user's own name. Debian's packages `slurm-wlm` and `munge` hold all of it.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.waiting import TIMEOUT_S

NODES = ("n1", "n2")
CPUS_PER_NODE = 2
_POLL_S = 0.3  # most conditions take a command of SLURM's, which takes a processor while jobs are at work
_DAEMONS = ("munged", "slurmctld", "slurmd")
_SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "DEADLINE")


def missing_commands() -> list[str]:
    """What has to be installed before a cluster can start."""
    wanted = (*_DAEMONS, "sbatch", "scontrol", "scancel", "squeue", "sinfo", "sdiag")
    return [name for name in wanted if shutil.which(name, path=_SEARCH_PATH) is None]


@dataclass(frozen=True)
class JobState:
    """One job, or one element of a job array, as `scontrol show job` gives it."""

    job: int
    state: str
    reason: str
    exit_code: int
    restarts: int
    node: str

    @property
    def ended(self) -> bool:
        return self.state in _ENDED


class SlurmCluster:
    """Start it with `start`, end it with `stop`; whatever is still running then is killed."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: a socket's path has 107 bytes at most
        self.config = self.folder / "slurm.conf"
        self.environ = {**os.environ, "SLURM_CONF": str(self.config), "PATH": _SEARCH_PATH}
        for name in [name for name in self.environ if name.startswith(("SLURM_", "SBATCH_")) and name != "SLURM_CONF"]:
            del self.environ[name]
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start the daemons and wait until both nodes are idle."""
        self.folder.chmod(0o711)  # munged wants every user to reach its socket
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        (self.folder / "state").mkdir()
        self.config.write_text(self._configuration())
        options = {name: self.folder / f"munge.{name}" for name in ("socket", "log", "seed", "pid")}
        self._start(
            "munged",
            "--foreground",
            f"--key-file={key}",
            f"--socket={options['socket']}",
            f"--log-file={options['log']}",
            f"--seed-file={options['seed']}",
            f"--pid-file={options['pid']}",
        )
        self.wait_for(options["socket"].exists, "munged")
        self._start("slurmctld", "-D", "-c")
        for node in NODES:
            self.start_node(node)
        self.wait_for_nodes(NODES)

    def stop(self) -> None:
        """End everything that the cluster started, jobs too, and remove its folder."""
        for daemon in self._daemons.values():
            daemon.terminate()
        deadline = time.monotonic() + 5
        for daemon in self._daemons.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(max(0.0, deadline - time.monotonic()))
        self._kill_all()
        for daemon in self._daemons.values():
            daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start_node(self, node: str) -> None:
        """Start the slurmd of a node."""
        self._start("slurmd", "-D", "-N", node, node=node)

    def revive_node(self, node: str) -> None:
        """Start the slurmd of a node that was killed, when the controller has nothing more to tell the dead one.

        It tries again after a minute, also to end a step: the step of the same number in the job's next start would be
        killed by that.
        """
        self.wait_for(lambda: not self._messages_under_way(), "the end of the messages to a dead node")
        self.start_node(node)

    def _messages_under_way(self) -> bool:
        """Whether the controller sends something to nodes, or waits to send it again."""
        counts = re.findall(r"^Agent (?:queue size|count|thread count):\s*(\d+)$", self.run("sdiag"), re.MULTILINE)
        assert len(counts) == 3, counts
        return set(counts) != {"0"}

    def kill_node(self, node: str) -> None:
        """Make a node die: its slurmd and all that runs under it, at once. SLURM takes minutes to notice."""
        daemon = self._daemons.pop(f"slurmd {node}")
        self._kill_all(node)
        daemon.wait()

    def notice(self, node: str) -> None:
        """Have SLURM notice now that a node is dead: it ends the node's jobs, and does not wait for an answer."""
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=dead")
        self.wait_for_nodes([node], "DOWN")

    def wait_for_nodes(self, nodes: Iterable[str], state: str = "IDLE", seconds: float = TIMEOUT_S) -> None:
        """Wait until nodes are in a state, such as IDLE or DOWN."""
        for node in nodes:

            def reached(node: str = node) -> bool:
                shown = self.run("scontrol", "show", "node", node, check=False)
                return re.search(rf"State={state}\b", shown) is not None

            self.wait_for(reached, f"node {node} to be {state}", seconds)

    def run(self, *command: str | Path, check: bool = True, cwd: Path | None = None, **variables: str) -> str:
        """Run a client command (squeue, scontrol, …); returns what it prints on stdout."""
        result = subprocess.run(
            list(map(str, command)),
            env={**self.environ, **variables},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert not check or result.returncode == 0, f"{command}: {result.stdout}{result.stderr}\n{self.logs()}"
        return result.stdout

    def submit(self, *arguments: str | Path, cwd: Path, **variables: str) -> int:
        """`sbatch arguments` in a folder, with environment variables; returns the number of the job."""
        return int(self.run("sbatch", "--parsable", *arguments, check=True, cwd=cwd, **variables).strip())

    def states(self, job: int) -> list[JobState]:
        """The job, or every element of the array."""
        return [_parse(block) for block in self.run("scontrol", "--oneliner", "show", "job", str(job)).splitlines()]

    def wait(self, job: int, seconds: float = TIMEOUT_S) -> list[JobState]:
        """Wait until a job, or all of an array, has ended; returns the states at the end."""
        self.wait_for(lambda: all(state.ended for state in self.states(job)), f"job {job}", seconds)
        return self.states(job)

    def wait_for(self, condition: Callable[[], bool], what: str, seconds: float = TIMEOUT_S) -> None:
        """Wait until a condition holds; a daemon that has ended, or too long a wait, fails the test with the logs."""
        deadline = time.monotonic() + seconds
        while not condition():
            dead = [name for name, daemon in self._daemons.items() if daemon.poll() is not None]
            late = time.monotonic() > deadline
            assert not dead and not late, (
                f"{' and '.join(dead) + ' ended' if dead else f'{seconds:g} s passed'} while waiting for {what}\n"
                f"{self.run('squeue', '--all', check=False)}\n{self.logs()}"
            )
            time.sleep(_POLL_S)

    def logs(self) -> str:
        """The ends of the daemons' logs, for the message of a failed test."""
        found = sorted(self.folder.glob("*.log"))
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-2000:]}" for path in found)

    def processes(self, node: str | None = None) -> list[int]:
        """The living processes of the cluster, or of one node: those that have its configuration in their
        environment, and their descendants (a job may clear its environment)."""
        parents: dict[int, int] = {}
        own: set[int] = set()
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                state, parent = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:2]
                if state == "Z":
                    continue
                parents[int(entry.name)] = int(parent)
                environ = (entry / "environ").read_bytes().split(b"\0")
                if f"SLURM_CONF={self.config}".encode() in environ and (
                    node is None or {f"SLURMD_NODENAME={node}".encode(), f"TEST_NODE={node}".encode()} & set(environ)
                ):
                    own.add(int(entry.name))
        grown = True
        while grown:
            grown = {pid for pid, parent in parents.items() if parent in own} - own
            own |= grown
        return sorted(own - {os.getpid()})

    def _start(self, command: str, *arguments: str, node: str = "") -> None:
        name = f"{command} {node}".strip()
        program = shutil.which(command, path=_SEARCH_PATH)
        assert program is not None, f"{command} is not installed"
        environ = {**self.environ, "TEST_NODE": node}
        with open(self.folder / f"{name.replace(' ', '.')}.out.log", "ab") as log:
            self._daemons[name] = subprocess.Popen([program, *arguments], env=environ, stdout=log, stderr=log)

    def _kill_all(self, node: str | None = None) -> None:
        """Kill what runs on a node, or on all, until nothing does: a killed process takes a while to die, and one that
        was being forked is found in the next round only."""
        deadline = time.monotonic() + TIMEOUT_S
        while processes := self.processes(node):
            assert time.monotonic() < deadline, f"killed, but still there: {processes}"
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.02)

    def _configuration(self) -> str:
        """See slurm.conf(5). `cred_expire` brings a requeued job back within seconds.

        SlurmdTimeout is as long as usual: a job has its time to find out about a dead node, on a busy machine as well.
        """
        controller, *ports = _free_ports(1 + len(NODES))
        first_job = 1 + secrets.randbelow(
            20_000
        )  # a step's port comes from it: tests that run beside each other differ
        user, folder = getpass.getuser(), self.folder
        lines = {
            "ClusterName": "test",
            "SlurmctldHost": "localhost",
            "SlurmctldPort": controller,
            "FirstJobId": first_job,
            "SlurmUser": user,
            "SlurmdUser": user,
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={folder}/munge.socket,cred_expire=5",
            "StateSaveLocation": f"{folder}/state",
            "SlurmdSpoolDir": f"{folder}/spool.%n",
            "SlurmctldPidFile": f"{folder}/slurmctld.pid",
            "SlurmdPidFile": f"{folder}/slurmd.%n.pid",
            "SlurmctldLogFile": f"{folder}/slurmctld.log",
            "SlurmdLogFile": f"{folder}/slurmd.%n.log",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core",
            "SchedulerParameters": "sched_interval=1,bf_interval=1,batch_sched_delay=0",
            "SlurmdParameters": "config_overrides",
            "ReturnToService": 2,
            "JobRequeue": 1,
            "KillWait": 5,
            "SlurmdTimeout": 300,
            "MpiDefault": "none",
        }
        text = "".join(f"{key}={value}\n" for key, value in lines.items())
        for node, port in zip(NODES, ports, strict=True):
            text += (
                f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs={CPUS_PER_NODE} "
                "RealMemory=8000 State=UNKNOWN\n"
            )
        return text + "PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n"


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _parse(block: str) -> JobState:
    fields = dict(re.findall(r"(?:^|\s)(\w+)=(\S*)", block))
    return JobState(
        int(fields["JobId"]),
        fields["JobState"],
        fields["Reason"],
        int(fields["ExitCode"].partition(":")[0]),
        int(fields["Restarts"]),
        fields.get("NodeList", ""),
    )
