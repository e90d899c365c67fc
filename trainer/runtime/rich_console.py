"""Rich's console for text that others wrote: their control characters are shown, those of rich's own go through."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.segment import Segment

from trainer.runtime.plain_text import printable


class PlainConsole(Console):
    """A console on which no text can move the cursor, retitle the terminal or recolour it."""

    def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
        """Render as rich does; each piece of text is made printable, each control of rich's own stays."""
        return _shown(super().render(renderable, options))


def _shown(segments: Iterable[Segment]) -> Iterator[Segment]:
    for segment in segments:
        if segment.control:
            yield segment
        else:
            yield Segment(printable(segment.text), segment.style)
