"""The error card, on a terminal and off it."""

from __future__ import annotations

import io

import pytest

from launcher.console import ErrorCard, exit_code, make_console, print_card
from trainer.errors import DamagedError, DivergedError, UserError

LONG_PROBLEM = "Unknown key 'modle'. Did you mean 'model'? " + "And more about it. " * 12


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_off_a_terminal_each_part_is_one_line() -> None:
    stream = io.StringIO()
    print_card(ErrorCard("Please check", LONG_PROBLEM, "modle", "Correct it."), stream)
    assert stream.getvalue().splitlines() == [
        f"Please check: {LONG_PROBLEM}",
        "  where:  modle",
        "  remedy: Correct it.",
    ]


def test_empty_parts_are_left_out() -> None:
    stream = io.StringIO()
    print_card(ErrorCard("Diverged", "no finite loss"), stream)
    assert stream.getvalue() == "Diverged: no finite loss\n"


def test_on_a_terminal_it_is_a_panel_with_everything_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    print_card(ErrorCard("Please check", "no file [bold]", "data.train=[x]", "Write [red] :smile: it."), stream)
    shown = stream.getvalue()
    assert "╭" in shown and "Please check" in shown
    # Brackets and colons are text, not markup.
    assert "no file [bold]" in shown and "data.train=[x]" in shown and "Write [red] :smile: it." in shown


def test_exit_codes() -> None:
    errors = [UserError("x"), DamagedError("x"), DivergedError("x"), ValueError("x"), KeyboardInterrupt()]
    assert [exit_code(error) for error in errors] == [2, 3, 4, 1, 130]


def test_console_keeps_brackets_and_long_lines() -> None:
    stream = io.StringIO()
    make_console(stream).print(f"[/data/x] :tada: {LONG_PROBLEM}")
    assert stream.getvalue() == f"[/data/x] :tada: {LONG_PROBLEM}\n"
