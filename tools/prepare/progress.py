"""Progress of a long read, in bytes and tokens."""

from __future__ import annotations

from tools.prepare.summary import human_bytes
from tools.progress import StepProgress


class ReadProgress(StepProgress):
    """A context manager; `update` takes totals. A total of 0 bytes means that it is unknown."""

    def update(self, read_bytes: int, tokens: int | None = None) -> None:
        """Show `read_bytes` and `tokens` so far; tokens None shows bytes alone."""
        state = human_bytes(read_bytes) + (f" of {human_bytes(self._total)}" if self._total else "")
        if tokens is not None:
            state += f", {tokens / 1e6:.1f} M tokens, {tokens / self.seconds / 1e6:.2f} M tokens/s"
        self.show(read_bytes, state)
