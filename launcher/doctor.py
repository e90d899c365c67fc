"""`maskwright doctor`: on this machine, or as one process on each node of a job."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from launcher.command import write_result
from launcher.environment import find_membership, hosts
from trainer.errors import EXIT_FINISHED, UserError
from trainer.runtime.paths import user_path
from trainer.runtime.process import node_name
from trainer.runtime.rendezvous import LOCALHOST, free_port

if TYPE_CHECKING:
    from tools.doctor.job import NodePlace


def examine_here(config_source: str | None, overrides: Sequence[str], as_json: bool) -> int:
    """Check this machine, and a config if one is given; returns the exit code."""
    from tools.doctor.run import examine
    from trainer.config.file import load_config

    report = examine(load_config(config_source, overrides) if config_source is not None else None)
    write_result(report, as_json)
    return report.exit_code


def examine_in_job(run: str, as_json: bool, answer_s: float) -> int:
    """Check this node together with the others of its job; the first one prints, and has the exit code of all."""
    from tools.doctor.job import examine_job

    report = examine_job(user_path(run, "--job"), find_place(os.environ), answer_s)
    if report is None:
        return EXIT_FINISHED
    write_result(report, as_json)
    return report.exit_code


def find_place(environ: Mapping[str, str]) -> NodePlace:
    """Find this node among those of the SLURM step; alone where there is no step of several tasks.

    Raises:
        UserError: when there are several tasks on a node.
    """
    from tools.doctor.job import NodePlace

    membership = find_membership(environ)
    if membership is None:
        return NodePlace(0, [node_name()], LOCALHOST, free_port())
    if membership.local_world_size != 1:
        raise UserError(
            f"{membership.local_world_size} tasks on a node, and one looks at a node.",
            where="--job",
            remedy="Start it with `srun --ntasks-per-node=1`.",
        )
    node_list = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or ""
    names = hosts(node_list) if node_list else [f"node-{rank}" for rank in range(membership.world_size)]
    return NodePlace(membership.rank, names, membership.master_address, membership.master_port)
