"""What all commands share: how they end, and options that several of them have."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer
from typer.core import TyperCommand

from launcher.console import EXIT_INTERRUPTED, Card, exit_code, make_console, print_card
from trainer.errors import EXIT_FINISHED, EXIT_USER_MISTAKE, MaskwrightError
from trainer.streams import loss_of, reader_has_left

if TYPE_CHECKING:
    from rich.console import Console

_OPTIONS_OF_SEVERAL_VALUES = ("--input",)


class Command(TyperCommand):
    """Ends with the exit code that its function returns (None is 0); an expected error becomes a card.

    What a command prints on stdout is its result: where that could not be written, code 0 becomes 2. A reader that
    leaves (`| head`) has what it wants.
    """

    prints_results = True

    @contextmanager
    def interrupts(self, received: list[int]) -> Iterator[None]:
        """Raise KeyboardInterrupt in the command, and note that; libraries may make another error of it."""

        def handle(number: int, _frame: object) -> None:
            received.append(number)
            raise KeyboardInterrupt

        previous = signal.signal(signal.SIGINT, handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, _repeat_option(args, _OPTIONS_OF_SEVERAL_VALUES))

    def invoke(self, ctx: Any) -> None:
        received: list[int] = []
        try:
            with self.interrupts(received):
                code = super().invoke(ctx)
        except BaseException as error:
            if received or isinstance(error, KeyboardInterrupt):  # whatever became of it on its way
                print("Interrupted.", file=sys.stderr)
                code = EXIT_INTERRUPTED
            elif isinstance(error, MaskwrightError):
                print_card(Card.of(error))
                code = exit_code(error)
            else:
                raise
        raise typer.Exit(code or (_code_of_results() if self.prints_results else EXIT_FINISHED))


class TrainingCommand(Command):
    """Its results are files, what it prints is a convenience, and it has handlers of its own for Ctrl-C."""

    prints_results = False

    @contextmanager
    def interrupts(self, received: list[int]) -> Iterator[None]:
        yield


def _code_of_results() -> int:
    """0, or 2 with a card where something that was printed on stdout did not arrive."""
    sys.stdout.flush()
    error = loss_of(sys.stdout)
    if error is None or reader_has_left(sys.stdout):
        return EXIT_FINISHED
    remedy = "Send the output to a place that has room."
    print_card(Card("Please check", f"The output could not be written: {error.strerror}.", "stdout", remedy))
    return EXIT_USER_MISTAKE


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


_SUFFIXES = {"K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}


def parse_count(text: str) -> int:
    """`10T`, `1.5G`, `8_192` → a whole number; K, M, G (or B) and T are powers of a thousand."""
    digits, factor = text.strip().replace("_", ""), 1
    if digits and digits[-1].upper() in _SUFFIXES:
        digits, factor = digits[:-1], _SUFFIXES[digits[-1].upper()]
    try:
        value = Decimal(digits) * factor
    except InvalidOperation:
        value = Decimal("nan")
    if not value.is_finite() or value != value.to_integral_value() or not 0 <= value < 2**63:
        raise typer.BadParameter(f"'{text}' is no whole number such as 512, 8_192, 1.5G or 10T.")
    return int(value)


ConfigSource = Annotated[
    str,
    typer.Argument(
        metavar="CONFIG", help="A YAML file, or a recipe: demo, roberta-base, roberta-base-fast, roberta-large."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", help="Config keys to override, such as batch.micro_size=4.", show_default=False
    ),
]
RunFolder = Annotated[str, typer.Argument(metavar="RUN", help="A run folder (run.dir of its config).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


def console_of_results(as_json: bool) -> Console:
    """What these commands say is their result: on stdout, unless JSON has it."""
    return make_console(sys.stderr if as_json else sys.stdout)


class Result(Protocol):
    """What a command found out, for a program and for a person."""

    def to_json(self) -> str: ...
    def print(self, console: Console) -> None: ...


def write_result(result: Result, as_json: bool) -> None:
    """Print a result on stdout."""
    if as_json:
        sys.stdout.write(result.to_json() + "\n")
    else:
        result.print(console_of_results(as_json))
