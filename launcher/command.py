"""What all commands share: how they end, and options that several of them have."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
from collections.abc import Iterator
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer
from typer.core import TyperCommand, TyperGroup

from launcher.console import EXIT_INTERRUPTED, ErrorCard, exit_code, make_console, print_card
from trainer.errors import EXIT_FINISHED, EXIT_USER_MISTAKE, MaskwrightError, UserError
from trainer.runtime.plain_text import fit
from trainer.runtime.streams import first_loss, reader_has_left

if TYPE_CHECKING:
    from rich.console import Console

_UsageError: Any = typer.BadParameter.__base__
MOST_LOCAL_RANKS = 1024
"""Processes that one command starts on a machine."""
MOST_RANKS = 1 << 20
"""Far above any cluster; a larger number is a slip."""
_OPTIONS_OF_SEVERAL_VALUES = ("--input", "--from", "--like", "--average")


class Command(TyperCommand):
    """Ends with the exit code that its function returns (None is 0); an expected error becomes a card.

    What a command prints on stdout is its result: where that could not be written, code 0 becomes 2. A reader that
    leaves (`| head`) has what it wants.
    """

    prints_results = True

    @contextlib.contextmanager
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
        with _short_usage_errors():
            left = super().parse_args(ctx, _repeat_option(args, _OPTIONS_OF_SEVERAL_VALUES))
            self._check_numbers(ctx)
        return left

    def _check_numbers(self, ctx: Any) -> None:
        """Refuse what passes typer's bounds, or has none: nan, infinity and whole numbers of more than 63 bits."""
        for parameter in self.params:
            value = ctx.params.get(parameter.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise typer.BadParameter(f"{value} is not a finite number.", ctx=ctx, param_hint=parameter.opts)
            if isinstance(value, int) and abs(value) >= 2**63:
                raise typer.BadParameter("The number is too large.", ctx=ctx, param_hint=parameter.opts)

    def invoke(self, ctx: Any) -> None:
        received: list[int] = []
        try:
            with self.interrupts(received):
                _check_current_folder()
                code = super().invoke(ctx)
        except BaseException as error:
            if received or isinstance(error, KeyboardInterrupt):  # whatever became of it on its way
                print("Interrupted.", file=sys.stderr)
                code = EXIT_INTERRUPTED
            elif isinstance(error, MaskwrightError):
                print_card(ErrorCard.of(error))
                code = exit_code(error)
            elif isinstance(error, OSError) and isinstance(error.filename, str | bytes):
                print_card(_of_system(error))
                code = EXIT_USER_MISTAKE
            else:
                raise
        raise typer.Exit(code or (_code_of_results() if self.prints_results else EXIT_FINISHED))


class TrainingCommand(Command):
    """Its results are files, what it prints is a convenience, and it has handlers of its own for Ctrl-C."""

    prints_results = False

    @contextlib.contextmanager
    def interrupts(self, received: list[int]) -> Iterator[None]:
        yield


def _code_of_results() -> int:
    """Return 0, or 2 with a card where something that was printed on stdout did not arrive."""
    sys.stdout.flush()
    error = first_loss(sys.stdout)
    if error is None or reader_has_left(sys.stdout):
        return EXIT_FINISHED
    remedy = "Send the output to a place that has room."
    print_card(ErrorCard("Please check", f"The output could not be written: {error.strerror}.", "stdout", remedy))
    return EXIT_USER_MISTAKE


class Group(TyperGroup):
    """Commands under one name; an unknown one is named in short."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        with _short_usage_errors():
            return super().resolve_command(ctx, args)


@contextlib.contextmanager
def _short_usage_errors() -> Iterator[None]:
    """Make what typer says of the command line, which quotes it, short and printable."""
    try:
        yield
    except _UsageError as error:
        error.message = fit(error.message, 1000)
        raise


def _check_current_folder() -> None:
    """Check that there is a current folder.

    Raises:
        UserError: where it was removed, for every relative path would fail.
    """
    try:
        os.getcwd()
    except OSError as error:
        problem = f"The current folder cannot be used: {error.strerror}."
        raise UserError(problem, where="the current folder", remedy="Change to a folder that exists.") from None


def _of_system(error: OSError) -> ErrorCard:
    """Make the card of what the system says of a file or folder that a command could not use."""
    return ErrorCard(
        "Please check",
        f"{error.strerror or type(error).__name__}: '{os.fsdecode(error.filename)}'.",
        os.fsdecode(error.filename),
        "See to the path, its permissions and the space on its disk, and run the same command again.",
    )


def _repeat_option(args: list[str], names: tuple[str, ...]) -> list[str]:
    """Turn `--input a b`, which a shell makes of `--input *.txt`, into `--input a --input b`."""
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
    """Read `10T`, `1.5G`, `8_192` as a whole number; K, M, G (or B) and T are powers of a thousand."""
    digits, factor = text.strip().replace("_", ""), 1
    if digits and digits[-1].upper() in _SUFFIXES:
        digits, factor = digits[:-1], _SUFFIXES[digits[-1].upper()]
    try:
        value = Decimal(digits) * factor
    except ArithmeticError:  # no number, or an exponent beyond Decimal's
        value = Decimal("nan")
    if not value.is_finite() or value != value.to_integral_value() or not 0 <= value < 2**63:
        raise typer.BadParameter(f"'{text}' is no whole number such as 512, 8_192, 1.5G or 10T.")
    return int(value)


def parse_size(text: str) -> int:
    """Read `500MB`, `1.5 GB` or `10G` as bytes, by powers of a thousand."""
    bare = text.strip().removesuffix("B").removesuffix("b").strip()
    try:
        return parse_count(bare)
    except typer.BadParameter:
        raise typer.BadParameter(f"'{text}' is no size such as 500MB or 10GB.") from None


ConfigSource = Annotated[
    str,
    typer.Argument(
        metavar="CONFIG",
        help="A YAML file, or a recipe: adapt, bert-24h, bert-wwm-chinese, deberta-v3-base, demo, distilbert, "
        "electra-small, modernbert-base, roberta-2026, roberta-base, roberta-base-fast, roberta-large, spanbert-base, "
        "tapt.",
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
    """Make the console of what these commands say is their result: on stdout, unless JSON has it."""
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
