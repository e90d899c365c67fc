"""TensorBoard: the same scalars as metrics.jsonl, and the resolved config as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter


class TensorBoardWriter:
    """Writes RUN/tensorboard; rank 0 only.

    Args:
        resumed_step: TensorBoard hides events of later steps, which an earlier start wrote and then lost; None for
            a fresh start.
    """

    def __init__(self, folder: Path, resumed_step: int | None, config_text: str) -> None:
        first_step = 0 if resumed_step is None else resumed_step + 1
        self._folder = str(folder)
        self._writer: SummaryWriter | None = SummaryWriter(self._folder, purge_step=first_step)
        self._writer.add_text("config", f"```yaml\n{config_text}\n```", first_step)

    def write(self, values: dict[str, Any], step: int) -> None:
        """Add the values of a step.

        Raises:
            OSError: when the disk is full, perhaps in an earlier step: a thread writes. That thread has then ended,
                so the next call begins another file, which TensorBoard shows as one with the first.
        """
        writer, self._writer = self._writer or SummaryWriter(self._folder), None
        for name, value in values.items():
            if "/" in name and isinstance(value, int | float):
                writer.add_scalar(name, value, step)
        self._writer = writer

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
