"""What all commands share: how they end, and options that several of them have."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from launcher.console import Card, exit_code, make_console, print_card
from trainer.errors import MaskwrightError

if TYPE_CHECKING:
    from rich.console import Console

_OPTIONS_OF_SEVERAL_VALUES = ("--input",)


class Command(TyperCommand):
    """Ends with the exit code that its function returns (None is 0); an expected error becomes a card."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, _repeat_option(args, _OPTIONS_OF_SEVERAL_VALUES))

    def invoke(self, ctx: Any) -> None:
        try:
            code = super().invoke(ctx)
        except MaskwrightError as error:
            print_card(Card.of(error))
            code = exit_code(error)
        except KeyboardInterrupt as error:
            print("Interrupted.", file=sys.stderr)
            code = exit_code(error)
        raise typer.Exit(code or 0)


def _repeat_option(args: list[str], names: tuple[str, ...]) -> list[str]:
    """`--input a b` → `--input a --input b`: what a shell makes of `--input *.txt`."""
    repeated: list[str] = []
    option = None
    for arg in args:
        if arg in names:
            option = arg
        elif arg.startswith("-"):
            option = None
            repeated.append(arg)
        else:
            repeated += [option, arg] if option else [arg]
    return repeated


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


def console_of_results(as_json: bool) -> Console:
    """What these commands say is their result: on stdout, unless JSON has it."""
    return make_console(sys.stderr if as_json else sys.stdout)
