"""Job scripts: those of slurm/ with options and settings filled in. Pure functions of text."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence

from trainer.errors import UserError
from trainer.runtime.plain_text import has_control

Options = Mapping[str, str | int | bool | None]
"""Options of sbatch by name without dashes; True stands alone, None and False leave one out."""
_OPTION_NAME = re.compile(r"[a-zA-Z][a-zA-Z0-9-]*")
_OPTION = re.compile(r"^#SBATCH --(?P<name>[a-z-]+)(?:=(?P<value>\S+))?$", re.MULTILINE)
_HEADER = re.compile(r"\A#!.*\n(?:#.*\n)*")
_SETTINGS = re.compile(r"^# --- settings: .*?^# --- end of settings ---$", re.MULTILINE | re.DOTALL)


def template_options(template: str) -> dict[str, str | int | bool | None]:
    """Find the options of sbatch that stand in a script of slurm/."""
    return {match["name"]: match["value"] or True for match in _OPTION.finditer(template)}


def render(
    template: str, comment: Sequence[str], options: Options, more: Sequence[str], settings: Sequence[str]
) -> str:
    """Fill in a script of slurm/.

    Args:
        comment: lines in the place of the template's own introduction.
        options: all of sbatch's.
        more: options as they were given, behind those.
        settings: shell lines in the place of those between its marks.

    Raises:
        UserError: for a control character in an option or a comment: a line end opens a line of its own.
    """
    lines = ["#!/bin/bash", *(f"# {_one_line(line, 'the job script')}" for line in comment), "#"]
    lines += [f"#SBATCH {option}" for option in (*write_options(options), *group_options(more))]
    rendered = _HEADER.sub(lambda _: "\n".join(lines) + "\n", template, count=1)
    block = "\n".join(["# --- settings of this run ---", *settings, "# --- end of settings ---"])
    rendered, count = _SETTINGS.subn(lambda _: block, rendered)
    assert count == 1, "a script of slurm/ has its settings between two marks"
    return rendered


def write_options(options: Options) -> list[str]:
    """Write `{"nodes": 2, "exclusive": True}` as `--nodes=2`, `--exclusive`, quoted for a line of #SBATCH."""
    given = {name: value for name, value in options.items() if value is not None and value is not False}
    written = []
    for name, value in given.items():
        if not _OPTION_NAME.fullmatch(name):
            raise UserError(f"'{name}' is no option of sbatch.", where=name, remedy="Write a name as in `partition`.")
        text = "" if value is True else f"={shlex.quote(_one_line(str(value), f'--{name}'))}"
        written.append(f"--{name}{text}")
    return written


def group_options(words: Sequence[str]) -> list[str]:
    """Group `--mem 0 -p gpu` into one text for each option with its value, quoted for a line of #SBATCH."""
    groups: list[list[str]] = []
    for word in words:
        if word.startswith("-") or not groups:
            groups.append([])
        groups[-1].append(shlex.quote(_one_line(word, word.partition("=")[0])))
    return [" ".join(group) for group in groups]


def _one_line(text: str, where: str) -> str:
    if has_control(text):
        problem = "What goes into a job script must be one line, without control characters."
        raise UserError(problem, where=f"{where} {text}", remedy="Correct it, or rename the file or folder.")
    return text


def literal(path: str) -> str:
    """Escape a path for sbatch's `--output`, where a percent sign begins a pattern (%j is the job's number)."""
    return path.replace("%", "%%")


def assign(name: str, value: str | Sequence[str]) -> str:
    """Write a shell assignment; several words become an array."""
    if isinstance(value, str):
        return f"{name}={shlex.quote(value)}"
    return f"{name}=({' '.join(map(shlex.quote, value))})"
