"""How were we started? torchrun, a SLURM step, or by hand: read from the environment, without side effects."""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from trainer.errors import UserError

_TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Below the range that the kernel hands out for outgoing connections (32768 and up).
_FIRST_PORT, _PORTS = 10_000, 20_000
_DIGITS, _SHOWN_CHARACTERS = 18, 100


@dataclass(frozen=True)
class Membership:
    """One rank's place among its peers, and where they meet."""

    started_by: Literal["torchrun", "srun", "local"]
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_address: str
    master_port: int

    def variables(self) -> dict[str, str]:
        """Make the environment variables that torch.distributed reads."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": self.master_address,
            "MASTER_PORT": str(self.master_port),
        }


def first_host(node_list: str) -> str:
    """Find the first host of a SLURM node list such as `gpu[03-06,11]`."""
    return hosts(node_list)[0]


def hosts(node_list: str) -> list[str]:
    """Find the hosts of a SLURM node list, as SLURM itself expands it; at least one."""
    try:
        result = subprocess.run(
            ["scontrol", "show", "hostnames", node_list], capture_output=True, text=True, check=True, timeout=60
        )
        found = result.stdout.split()
        if not found:
            raise OSError("it printed nothing")
        return found
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(
            f"`scontrol show hostnames` did not give the hosts of '{node_list}': {error}",
            where="MASTER_ADDR",
            remedy="Export MASTER_ADDR before srun: the name of the job's first node, as the others reach it.",
        ) from None


def find_membership(
    environ: Mapping[str, str], find_first_host: Callable[[str], str] = first_host
) -> Membership | None:
    """Find this process's place when torchrun or srun started it; None when nobody did.

    A SLURM step of one task counts as started by hand: it may start local ranks of its own.

    Raises:
        UserError: when the variables contradict themselves, or a SLURM step of several tasks does not tell where
            rank 0 is. There is no fallback to localhost: each node would wait for itself.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        if "LOCAL_RANK" in environ:
            return _from_torchrun(environ)
        if environ["WORLD_SIZE"] != "1":
            raise UserError(
                f"RANK={environ['RANK']} and WORLD_SIZE={environ['WORLD_SIZE']} are set, LOCAL_RANK is not.",
                where="LOCAL_RANK",
                remedy="Start with torchrun or srun, which set all of them, or unset RANK and WORLD_SIZE.",
            )
    if "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ:
        task_count = _integer(environ, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS")
        if task_count > 1:
            return _from_srun(environ, task_count, find_first_host)
    return None


def _from_torchrun(environ: Mapping[str, str]) -> Membership:
    missing = [name for name in _TORCHRUN_VARIABLES if name not in environ]
    if missing:
        raise UserError(
            f"RANK, WORLD_SIZE and LOCAL_RANK are set, but not {' and '.join(missing)}.",
            where=", ".join(missing),
            remedy="Start with torchrun or srun, which set all of them, or unset RANK, WORLD_SIZE and LOCAL_RANK.",
        )
    rank, world_size = _place(environ, "RANK", "WORLD_SIZE")
    local_rank, local_world_size = _place(environ, "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if local_world_size > world_size:
        raise _not_a_start(
            f"LOCAL_WORLD_SIZE is {local_world_size}, more than there are ranks (WORLD_SIZE={world_size}).",
            "LOCAL_WORLD_SIZE",
        )
    return Membership(
        started_by="torchrun",
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        master_address=environ["MASTER_ADDR"],
        master_port=_port(environ),
    )


def _from_srun(environ: Mapping[str, str], task_count: int, find_first_host: Callable[[str], str]) -> Membership:
    node_index = _integer(environ, "SLURM_NODEID")
    tasks_name = next((n for n in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE") if n in environ), "")
    tasks_per_node = _expand_tasks_per_node(environ.get(tasks_name, ""))
    if node_index >= len(tasks_per_node):
        raise UserError(
            f"Not a task count for each node: '{environ.get(tasks_name, '')}', and this is node {node_index}.",
            where=tasks_name or "SLURM_STEP_TASKS_PER_NODE",
            remedy="Start with srun, and let its SLURM_* variables through to the container.",
        )
    address = environ.get("MASTER_ADDR")
    if not address:
        node_list = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
        if not node_list:
            raise UserError(
                "A SLURM step of several tasks, but neither MASTER_ADDR nor SLURM_JOB_NODELIST is set.",
                where="MASTER_ADDR",
                remedy="Export MASTER_ADDR before srun: the name of the job's first node, as the others reach it.",
            )
        address = find_first_host(node_list)
    local_world_size = tasks_per_node[node_index]
    return Membership(
        started_by="srun",
        rank=_below(environ, "SLURM_PROCID", task_count),
        world_size=task_count,
        local_rank=_below(environ, "SLURM_LOCALID", local_world_size),
        local_world_size=local_world_size,
        master_address=address,
        master_port=_port(environ) if environ.get("MASTER_PORT") else _port_of_step(environ),
    )


def _port_of_step(environ: Mapping[str, str]) -> int:
    """Derive the port of a step, the same in all tasks; jobs that share a node, and the steps of one job, differ."""
    return _FIRST_PORT + (_integer(environ, "SLURM_JOB_ID") + 1009 * _integer(environ, "SLURM_STEP_ID")) % _PORTS


def _expand_tasks_per_node(text: str) -> list[int]:
    """Expand `2(x3),1` to [2, 2, 2, 1]; return an empty list when it is not of this form."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not match:
            return []
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def checked_address(address: str, where: str) -> str:
    """Check that this machine can look up a name or address of a machine, and return it.

    Raises:
        UserError: when it cannot; `where` is who gave it.
    """
    try:
        socket.getaddrinfo(address or " ", None)  # an empty one would be this machine
    except UnicodeError:
        reason = "its parts are too long, or not letters, digits and hyphens"
    except OSError as error:
        if error.errno == socket.EAI_AGAIN:  # the name server does not answer now; the ranks try for minutes
            return address
        reason = error.strerror or str(error)
    else:
        return address
    shown = address if len(address) <= _SHOWN_CHARACTERS else f"{address[:_SHOWN_CHARACTERS]}…"
    raise UserError(
        f"{shown!r} is no name or address of a machine: {reason}.",
        where=where,
        remedy="Give the name or the address of node 0 as this machine reaches it.",
    )


def _place(environ: Mapping[str, str], rank_name: str, size_name: str) -> tuple[int, int]:
    """Read a rank and how many there are."""
    size = _integer(environ, size_name)
    if size < 1:
        raise _not_a_start(f"{size_name} is {size}: there is no rank.", size_name)
    return _below(environ, rank_name, size), size


def _below(environ: Mapping[str, str], name: str, size: int) -> int:
    rank = _integer(environ, name)
    if rank >= size:
        raise _not_a_start(f"{name} is {rank}, and there are {size}: they are numbered from 0.", name)
    return rank


def _port(environ: Mapping[str, str]) -> int:
    port = _integer(environ, "MASTER_PORT")
    if not 0 < port < 1 << 16:
        raise UserError(
            f"MASTER_PORT is {port}, and ports end at 65535.",
            where="MASTER_PORT",
            remedy="Export a free port of the first node, from 1024 to 65535, or leave it to torchrun or srun.",
        )
    return port


def _integer(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name)
    if value is None:
        raise _not_a_start(f"Environment variable {name} is not set.", name)
    if not value.isdecimal() or len(value) > _DIGITS:
        shown = value if len(value) <= _SHOWN_CHARACTERS else f"{value[:_SHOWN_CHARACTERS]}…"
        raise _not_a_start(f"Environment variable {name} is {shown!r}, not a number.", name)
    return int(value)


def _not_a_start(problem: str, name: str) -> UserError:
    return UserError(
        problem,
        where=name,
        remedy="Start with torchrun or srun, which set it, or unset the variables of such a start.",
    )
