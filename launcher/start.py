"""`maskwright train`: join the ranks that srun or torchrun started, start local ones, or train in this process."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from launcher.environment import Membership, find_membership
from launcher.local import launch, local_membership
from launcher.rank import hold_stop_signals, report_and_end, run_rank
from trainer.config import Config
from trainer.config_file import load_config
from trainer.errors import UserError
from trainer.rendezvous import LISTENER_VARIABLE, listen


def start_training(
    config_source: str, overrides: Sequence[str], process_count: int | None, resume: str, dry_run: bool
) -> int:
    """Train, in this process or in ranks of its own, and return the exit code.

    Raises:
        UserError: for a mistake in the config or in how the ranks were started, before any process is.
    """
    membership = find_membership(os.environ)
    if membership is None:
        if (process_count or 1) > 1:
            config = load_config(config_source, overrides)
            command = _rank_command(config_source, overrides, resume, dry_run)
            return launch(command, process_count or 1, _folder_of_logs(config, dry_run))
        listener = listen()
        membership = local_membership(rank=0, world_size=1, port=listener.getsockname()[1])
        os.environ[LISTENER_VARIABLE] = str(listener.detach())
    elif process_count not in (None, membership.local_world_size):
        raise UserError(
            f"{membership.started_by} started {membership.local_world_size} ranks on this node, "
            f"--nproc-per-node asks for {process_count}.",
            where="--nproc-per-node",
            remedy=f"Leave it out: {membership.started_by} starts the ranks.",
        )
    return _train_here(membership, config_source, overrides, resume, dry_run)


def _train_here(
    membership: Membership, config_source: str, overrides: Sequence[str], resume: str, dry_run: bool
) -> int:
    os.environ.update(membership.variables())
    config = load_config(config_source, overrides)
    run_dir = _folder_of_logs(config, dry_run)
    hold_stop_signals()

    def work() -> int:
        from tools.prepare.on_demand import prepare_raw_text
        from trainer.train import run

        return run(config, resume, dry_run, prepare_raw_text, give_up=partial(report_and_end, run_dir=run_dir))

    return run_rank(work, run_dir)


def _folder_of_logs(config: Config, dry_run: bool) -> Path | None:
    """The run folder; None for a dry run, which leaves nothing behind."""
    return None if dry_run else Path(config.run.dir).expanduser()


def _rank_command(config_source: str, overrides: Sequence[str], resume: str, dry_run: bool) -> list[str]:
    command = [sys.executable, "-m", "launcher", "train", config_source, *overrides, "--resume", resume]
    return [*command, "--dry-run"] if dry_run else command
