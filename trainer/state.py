"""What a resume needs beside weights and optimizer: where the run stands."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass
class TrainState:
    """Counters of a run.

    Attributes:
        step: optimizer steps done, skipped ones included.
        samples: blocks consumed; the only state of the data order.
        tokens: positions consumed (samples × seq_len at the time).
        skipped_steps: steps whose update was skipped because a gradient was not finite.
        skipped_in_a_row: the same, since the last good step.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0

    def advance(self, samples: int, seq_len: int, applied: bool) -> None:
        """Count one optimizer step over `samples` blocks."""
        self.step += 1
        self.samples += samples
        self.tokens += samples * seq_len
        self.skipped_steps += not applied
        self.skipped_in_a_row = 0 if applied else self.skipped_in_a_row + 1

    def to_dict(self) -> dict[str, int]:
        return asdict(self)
