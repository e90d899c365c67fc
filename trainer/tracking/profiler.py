"""A trace of some steps by torch.profiler (`train.profile`), for TensorBoard's profiler plug-in or Perfetto."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch.profiler import record_function

from trainer.config import ProfileConfig
from trainer.runtime.distributed import World

logger = logging.getLogger(__name__)

RANGES = ("data", "forward", "backward", "optimizer")
"""What a step is divided into; the last micro-batch's backward pass holds the reduction of gradients as well."""
_NOTHING = nullcontext()


class StepProfiler:
    """Profiles the steps of a run that are asked for; at all others, and without settings, it costs nothing.

    Args:
        settings: None profiles nothing.
        first_step: that this start does; those before were done by an earlier one.
        say: shows a line, on rank 0.
    """

    def __init__(
        self,
        settings: ProfileConfig | None,
        run_dir: Path,
        world: World,
        first_step: int,
        say: Callable[[str], None],
    ) -> None:
        self._run_dir, self._world, self._say = run_dir, world, say
        self._profiler: torch.profiler.profile | None = None
        self._begun_with = self._last = 0
        self._steps = range(0) if settings is None else range(settings.start, settings.start + settings.steps)
        if self._steps and first_step > self._steps.start:
            left = f"steps {first_step:,} to {self._steps[-1]:,}" if first_step in self._steps else "nothing"
            say(f"profile: steps before {first_step:,} were done by an earlier start; {left} will be profiled")
        if settings is not None and not settings.all_ranks and not world.is_main:
            self._steps = range(0)

    def step(self, number: int) -> AbstractContextManager[None]:
        """Profile a step of the run, if asked for; its trace is written when it is the last that was asked for."""
        return self._profiled(number) if number in self._steps else _NOTHING

    def close(self) -> None:
        """Write what has been profiled, if anything: the run ends, or goes back to an earlier step."""
        if self._profiler is not None:
            self._write(self._profiler)
            self._profiler = None

    def range(self, name: str) -> AbstractContextManager[object]:
        """Mark a part of a step, one of RANGES."""
        return record_function(name) if self._profiler is not None else _NOTHING

    @contextmanager
    def _profiled(self, number: int) -> Iterator[None]:
        if self._profiler is None:
            self._profiler, self._begun_with = torch.profiler.profile(), number
            self._profiler.start()
        self._last = number
        with record_function(f"ProfilerStep#{number}"):  # the name by which TensorBoard knows steps
            yield
        if number == self._steps[-1]:
            self.close()

    def _write(self, profiler: torch.profiler.profile) -> None:
        profiler.stop()
        folder = self._run_dir / "profile" / f"steps-{self._begun_with:08d}-{self._last:08d}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(folder / f"rank-{self._world.rank:05d}.pt.trace.json.gz"))
        except OSError as error:  # a full disk costs the trace, not the run
            logger.warning("the profile of steps %d to %d is not written: %s", self._begun_with, self._last, error)
            return
        self._say(
            f"profile of steps {self._begun_with:,} to {self._last:,}: {folder} (tensorboard --logdir {folder.parent}, "
            "with its profiler plug-in, or ui.perfetto.dev)"
        )
