"""What a user should know of the input before it is prepared, as notes of one line."""

from __future__ import annotations

from itertools import islice

from tools.prepare.compression import large_window, open_input
from tools.prepare.lines import is_blank, split_lines
from tools.prepare.option_names import OptionNames
from tools.prepare.pieces import InputFiles

_FILES_LOOKED_AT = 8
_LINES_LOOKED_AT = 2000
_FEWEST_LINES = 10


def input_notes(inputs: InputFiles, documents: str, names: OptionNames) -> list[str]:
    """Write notes on text that is one document because no line is blank, and on compression that takes much memory."""
    notes = []
    if documents == "paragraph" and (lines := _lines_without_blank_one(inputs)):
        notes.append(
            f"Note: there is no blank line in {lines:,} lines of the text, so each file is one document. "
            f"If each line is one: {names('documents', 'line')}."
        )
    if window := large_window(file.path for file in inputs.files if inputs.format != "hub"):
        notes.append(
            f"Note: .zst files with windows of up to {window >> 20:,} MiB (zstd --long); each worker needs as much "
            "memory."
        )
    return notes


def _lines_without_blank_one(inputs: InputFiles) -> int:
    """Count the lines that the first files begin with, when none is blank and each file has several; else return 0."""
    total = 0
    for file in [file for file in inputs.files if file.size][:_FILES_LOOKED_AT]:
        try:
            opened, raw = open_input(file.path)
            with raw, opened:
                lines = list(islice(split_lines(opened), _LINES_LOOKED_AT))
        except Exception:  # every codec raises its own; the reader says what is wrong with the file
            return 0
        while lines and is_blank(lines[-1]):
            lines.pop()
        if len(lines) < _FEWEST_LINES or any(map(is_blank, lines)):
            return 0
        total += len(lines)
    return total
