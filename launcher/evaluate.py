"""`maskwright evaluate`: in this process, in ranks of its own, or as one of those that srun or torchrun started."""

from __future__ import annotations

import logging
import os
import signal
import sys
from typing import TYPE_CHECKING

from launcher.command import write_result
from launcher.console import make_console
from launcher.environment import find_membership
from launcher.local import launch
from launcher.rank import run_rank
from launcher.start import refuse_other_count
from trainer.errors import EXIT_FINISHED
from trainer.runtime.logs import console_handler
from trainer.runtime.signals import STOP_SIGNALS

if TYPE_CHECKING:
    from tools.evaluate.options import EvaluateOptions


def start_evaluation(options: EvaluateOptions, as_json: bool, process_count: int | None) -> int:
    """Evaluate and print the result; returns the exit code.

    Raises:
        UserError: for a mistake, where there is one process.
    """
    membership = find_membership(os.environ)
    if membership is None and (process_count or 1) > 1:
        command = [sys.executable, "-P", "-m", "launcher", "evaluate", *(["--json"] if as_json else [])]
        return launch([*command, *options.arguments()], process_count or 1, None)
    logging.getLogger().addHandler(console_handler(sys.stderr))  # there is no log, and an error ends in its card
    if membership is None:
        from tools.evaluate.run import evaluate, this_process

        write_result(evaluate(options, this_process(), make_console()), as_json)
        return EXIT_FINISHED
    refuse_other_count(membership, process_count)
    os.environ.update(membership.variables())
    return run_rank(lambda: _as_rank(options, as_json), None)


def _as_rank(options: EvaluateOptions, as_json: bool) -> int:
    from tools.evaluate.run import evaluate
    from trainer.runtime import distributed

    for number in STOP_SIGNALS:  # there is nothing to save: each of them ends the rank, as Ctrl-C does
        signal.signal(number, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    world = distributed.start()
    try:
        report = evaluate(options, world, make_console())
    finally:
        distributed.stop()
    if world.is_main:
        write_result(report, as_json)
    return EXIT_FINISHED
