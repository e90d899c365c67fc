"""What a person sees: the console for messages, and the error card.

Messages go to stderr; stdout is for results alone, so that `maskwright data show DIR --json | jq` works.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from trainer.errors import EXIT_UNEXPECTED, MaskwrightError
from trainer.runtime.plain_text import fit

if TYPE_CHECKING:
    from rich.console import Console

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count it
PLAIN_WIDTH = 120


@dataclass(frozen=True)
class ErrorCard:
    """A short message about an error: what is wrong, where, and what to do."""

    title: str
    problem: str
    where: str = ""
    remedy: str = ""

    @classmethod
    def of(cls, error: MaskwrightError) -> ErrorCard:
        return cls(error.title, error.problem, error.where, error.remedy)

    def fitted(self) -> ErrorCard:
        """Make the card as it is shown: short, whatever a value or a library's message holds, and printable."""
        return ErrorCard(self.title, fit(self.problem, 1500), fit(self.where, 600), fit(self.remedy, 1000))


def exit_code(error: BaseException) -> int:
    """Find the process exit code that an exception stands for."""
    if isinstance(error, MaskwrightError):
        return error.exit_code
    return EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else EXIT_UNEXPECTED


def make_console(file: TextIO | None = None) -> Console:
    """Make a rich console on stderr (or `file`).

    Square brackets are text, not markup: they stand in file names and tokens. Off a terminal, lines are neither
    wrapped nor cut, so that a log can be searched.
    """
    from trainer.runtime.rich_console import PlainConsole

    stream = file or sys.stderr
    is_terminal = stream.isatty()
    return PlainConsole(
        file=stream,
        markup=False,
        emoji=False,
        highlight=False,
        soft_wrap=not is_terminal,
        width=None if is_terminal else PLAIN_WIDTH,
    )


def print_card(card: ErrorCard, file: TextIO | None = None) -> None:
    """Print the card on stderr (or `file`): a panel on a terminal, plain lines off it."""
    stream, card = file or sys.stderr, card.fitted()
    if stream.isatty():
        _print_panel(card, stream)
    else:
        print(f"{card.title}: {card.problem}", file=stream)
        for label, text in (("where", card.where), ("remedy", card.remedy)):
            if text:
                print(f"  {label + ':':<8}{text}", file=stream)
    stream.flush()


def _print_panel(card: ErrorCard, file: TextIO) -> None:
    from rich.panel import Panel
    from rich.text import Text

    body = Text(card.problem)
    for label, text in (("where", card.where), ("remedy", card.remedy)):
        if text:
            body.append(f"\n{label + ':':<8}", style="bold").append(text)
    make_console(file).print(Panel(body, title=Text(card.title), title_align="left", border_style="red"))
