"""`maskwright train`: join the ranks that srun or torchrun started, start local ones, or train in this process."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from launcher.environment import Membership, checked_address, find_membership
from launcher.local import Nodes, launch, local_membership
from launcher.rank import report_and_end, run_rank
from trainer.config import Config
from trainer.config.file import load_config
from trainer.errors import MaskwrightError, UserError
from trainer.runtime.paths import user_path
from trainer.runtime.rendezvous import LISTENER_VARIABLE, listen

DEFAULT_MASTER_PORT = 29500  # torchrun's


@dataclass(frozen=True)
class ProcessOptions:
    """What `maskwright train` was told about processes; None where it was told nothing.

    Attributes:
        process_count: ranks a node.
        node_count, node_rank: nodes, and this one's number among them.
        master_address, master_port: where rank 0 is, on node 0.
    """

    process_count: int | None = None
    node_count: int | None = None
    node_rank: int | None = None
    master_address: str | None = None
    master_port: int | None = None

    @property
    def of_nodes(self) -> dict[str, int | str]:
        """The options about several nodes that were given."""
        values = {
            "--nnodes": self.node_count,
            "--node-rank": self.node_rank,
            "--master-addr": self.master_address,
            "--master-port": self.master_port,
        }
        return {name: value for name, value in values.items() if value is not None}

    def nodes(self) -> Nodes | None:
        """Find this node among the others; None when it is the only one.

        Raises:
            UserError: when an option is missing, or they contradict each other.
        """
        given = self.of_nodes
        if not given:
            return None
        missing = [name for name in ("--nnodes", "--node-rank", "--master-addr") if name not in given]
        if missing:
            raise UserError(
                f"{' and '.join(given)} given, but not {' and '.join(missing)}.",
                where=", ".join(missing),
                remedy="On each of K nodes: --nnodes K --node-rank I (from 0) --master-addr NODE0, and the same "
                "--nproc-per-node.",
            )
        assert self.node_count is not None and self.node_rank is not None and self.master_address is not None
        if self.node_rank >= self.node_count:
            raise UserError(
                f"There is no node {self.node_rank} of {self.node_count}: they are numbered from 0.",
                where="--node-rank",
                remedy=f"Give a number from 0 to {self.node_count - 1}, another one on each node.",
            )
        checked_address(self.master_address, "--master-addr")
        return Nodes(self.node_count, self.node_rank, self.master_address, self.master_port or DEFAULT_MASTER_PORT)


def start_training(
    config_source: str, overrides: Sequence[str], resume: str, dry_run: bool, options: ProcessOptions
) -> int:
    """Train, in this process or in ranks of its own, and return the exit code.

    Raises:
        UserError: for a mistake in the config or in how the ranks were started, before any process is.
    """
    membership = find_membership(os.environ)
    process_count = options.process_count
    if membership is not None:
        checked_address(membership.master_address, "MASTER_ADDR")
    if membership is None:
        nodes = options.nodes()
        if (process_count or 1) > 1 or nodes is not None:
            command = _rank_command(config_source, overrides, resume, dry_run)
            if nodes is not None:
                _say_place(nodes, process_count or 1)
            run_dir = _checked_folder(config_source, overrides, dry_run, nodes)
            return launch(command, process_count or 1, run_dir, nodes=nodes)
        listener = listen()
        membership = local_membership(rank=0, world_size=1, port=listener.getsockname()[1])
        os.environ[LISTENER_VARIABLE] = str(listener.detach())
    elif options.of_nodes:
        raise UserError(
            f"{membership.started_by} started these ranks and says where they meet; {' and '.join(options.of_nodes)} "
            f"would say it again.",
            where=", ".join(options.of_nodes),
            remedy=f"Leave it out: {membership.started_by} starts the ranks.",
        )
    else:
        refuse_other_count(membership, process_count)
    return _train_here(membership, config_source, overrides, resume, dry_run)


def refuse_other_count(membership: Membership, process_count: int | None) -> None:
    """Refuse a number of ranks that is not the one that torchrun or srun has started.

    Raises:
        UserError: with both.
    """
    if process_count not in (None, membership.local_world_size):
        raise UserError(
            f"{membership.started_by} started {membership.local_world_size} ranks on this node, "
            f"--nproc-per-node asks for {process_count}.",
            where="--nproc-per-node",
            remedy=f"Leave it out: {membership.started_by} starts the ranks.",
        )


def _checked_folder(config_source: str, overrides: Sequence[str], dry_run: bool, nodes: Nodes | None) -> Path | None:
    """Find where the ranks' logs will lie.

    Raises:
        UserError: for a mistake in the config, unless other nodes wait for the ranks of this one: those tell them.
    """
    try:
        return _folder_of_logs(load_config(config_source, overrides), dry_run)
    except MaskwrightError as error:
        if nodes is None or nodes.count == 1:
            raise
        print(f"{error.problem} The other nodes are told when they meet this one.", file=sys.stderr)
        return None


def _say_place(nodes: Nodes, process_count: int) -> None:
    first = nodes.index * process_count
    place = f"{nodes.master_address}:{nodes.master_port}"
    waits = f"they meet at {place}" if nodes.index == 0 else f"the console is that of node 0, they meet at {place}"
    print(
        f"node {nodes.index} of {nodes.count}: ranks {first} to {first + process_count - 1}; {waits}", file=sys.stderr
    )


def _train_here(
    membership: Membership, config_source: str, overrides: Sequence[str], resume: str, dry_run: bool
) -> int:
    os.environ.update(membership.variables())
    try:
        config = load_config(config_source, overrides)
    except MaskwrightError as error:
        return _tell_others(error, membership.world_size)
    run_dir = _folder_of_logs(config, dry_run)

    def work() -> int:
        with _imports_kept():
            from tools.prepare.on_demand import prepare_raw_text
            from trainer.train import run

        return run(config, resume, dry_run, prepare_raw_text, give_up=partial(report_and_end, run_dir=run_dir))

    return run_rank(work, run_dir)


@contextmanager
def _imports_kept() -> Iterator[None]:
    """Import without the search for garbage, neither now nor, among what was imported, while training.

    Imports make a million objects that stay. To look through them again and again takes a fifth of a start, and later
    each full search would hold up a step.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _tell_others(error: MaskwrightError, world_size: int) -> int:
    """End all ranks with what this one has met in its config; the others wait for it."""
    if world_size == 1:
        raise error

    def work() -> int:
        from trainer.inputs.consistency import tell_others

        tell_others(error)
        return error.exit_code

    return run_rank(work, None)


def _folder_of_logs(config: Config, dry_run: bool) -> Path | None:
    """Find the run folder; None for a dry run, which leaves nothing behind."""
    return None if dry_run else user_path(config.run.dir, "run.dir")


def _rank_command(config_source: str, overrides: Sequence[str], resume: str, dry_run: bool) -> list[str]:
    command = [sys.executable, "-P", "-m", "launcher", "train", config_source, *overrides, "--resume", resume]
    return [*command, "--dry-run"] if dry_run else command
