"""TensorBoard: the same scalars as metrics.jsonl, and the resolved config as text."""

from __future__ import annotations

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


class TensorBoardWriter:
    """Writes RUN/tensorboard; rank 0 only.

    Args:
        resumed_step: TensorBoard hides events of later steps, which an earlier start wrote and then lost; None for
            a fresh start.
    """

    def __init__(self, folder: Path, resumed_step: int | None, config_text: str) -> None:
        first_step = 0 if resumed_step is None else resumed_step + 1
        self._writer = SummaryWriter(str(folder), purge_step=first_step)
        self._writer.add_text("config", f"```yaml\n{config_text}\n```", first_step)

    def write(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            if "/" in name and value is not None:
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()
