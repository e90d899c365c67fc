"""Which files are read, and as what: paths, globs and folders become one sorted list of files of one format."""

from __future__ import annotations

import functools
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tools.prepare.compression import COMPRESSIONS
from tools.prepare.option_names import COMMAND_LINE, OptionNames
from tools.prepare.paths import shown
from tools.prepare.pieces import InputFile, InputFiles
from tools.prepare.walk import PassedOver, Walk
from trainer.errors import UserError, nearest
from trainer.runtime.paths import absolute

FORMAT_OF_SUFFIX = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
FORMATS = ("text", "jsonl", "csv", "parquet", "arrow", "hub")
TEXT_DOCUMENTS = ("paragraph", "line", "file")
_KNOWN = ", ".join(FORMAT_OF_SUFFIX) + "; each may end in " + ", ".join(COMPRESSIONS)


def find_inputs(
    inputs: Sequence[str],
    format: str = "auto",
    names: OptionNames = COMMAND_LINE,
    excluded: Iterable[str | os.PathLike[str]] = (),
) -> InputFiles:
    """Expand paths, globs and folders (recursively, through linked folders too, files with a known suffix).

    Args:
        names: how messages name the options.
        excluded: folders within an input that are not searched: the output, which would else become an input.

    Raises:
        UserError: for a missing path, a folder or glob without files, a link that leads nowhere, an unknown suffix, or
            several formats at once.
    """
    if not inputs:
        remedy = f"Give files, folders or globs with {names('input')}."
        raise UserError("No input was given.", where=names("input"), remedy=remedy)
    if format not in ("auto", *FORMATS):
        raise UserError(
            f"Unknown format '{format}'.{nearest(format, FORMATS)}",
            where=names("format", format),
            remedy=f"Choose one of auto, {', '.join(FORMATS)}.",
        )
    if format == "hub":
        from tools.prepare.hub import find_hub_inputs

        return find_hub_inputs(inputs)
    walk = Walk(lambda path: _reason_to_pass(path, format), [os.fspath(path) for path in excluded])
    found: dict[str, tuple[str, str, int]] = {}
    real_path = functools.cache(lambda folder: str(os.path.realpath(folder)))
    for source, given in enumerate(inputs):
        path = absolute(given, names("input"))
        before = walk.passed_over.total
        files = [(_place_of(path, real_path), path, name) for path, name in walk.find(given, path)]
        if not files:
            raise _nothing_in(given, format, walk.passed_over if walk.passed_over.total > before else None, names)
        for place, path, name in sorted(files, key=lambda file: (file[0] != file[1], file)):  # links come last
            found.setdefault(place, (path, name, source))
    files = tuple(_describe(path, shown(name), source) for path, name, source in sorted(found.values()))
    chosen = format if format != "auto" else _common_format([file.path for file in files], names)
    if not sum(file.size for file in files):
        raise UserError(
            f"The input is empty: {len(files)} file{'s' if len(files) > 1 else ''} of 0 bytes.",
            where=", ".join(map(shown, inputs)),
            remedy="Give files that hold text.",
        )
    return InputFiles(chosen, files, _sources(inputs, files), walk.passed_over)


def resolve_documents(documents: str | None, format: str, names: OptionNames = COMMAND_LINE) -> str:
    """Choose what one document is: `documents` when it fits the format, else the format's default; a line is a row."""
    allowed = TEXT_DOCUMENTS if format == "text" else ("row",)
    if documents is None or (documents == "line" and format != "text"):
        return allowed[0]
    if documents not in allowed:
        raise UserError(
            f"Documents of {format} input cannot be '{documents}'.",
            where=names("documents", documents),
            remedy=f"Choose {' or '.join(allowed)}.",
        )
    return documents


def format_of(path: str) -> str | None:
    """Find the format that a file name stands for; a name without a suffix is text, an unknown suffix None."""
    suffix = _suffix(path)
    return FORMAT_OF_SUFFIX.get(suffix) if suffix else "text"


def _suffix(path: str) -> str:
    bare = Path(path)
    if bare.suffix.lower() in COMPRESSIONS:
        bare = bare.with_suffix("")
    return bare.suffix.lower()


def _reason_to_pass(path: str, format: str) -> str | None:
    """Say why a file in a folder is no input; None when it is: a known suffix, and of `format` unless that is auto."""
    suffix, found = _suffix(path), format_of(path)
    if suffix and found and format in ("auto", found):
        return None
    return shown(suffix) or "no suffix"


def _place_of(path: str, real_path: Callable[[str], str]) -> str:
    """Resolve the links to folders in a path: what is left is what makes two paths the same file."""
    folder, name = os.path.split(path)
    return os.path.join(real_path(folder), name)


def _sources(inputs: Sequence[str], files: Sequence[InputFile]) -> tuple[dict[str, Any], ...]:
    """Collect what the manifest says of each input."""
    sources = []
    for number, given in enumerate(inputs):
        own = [file for file in files if file.source == number]
        name = shown(os.path.basename(absolute(given)))
        sources.append({"name": name, "files": len(own), "bytes": sum(file.size for file in own)})
    return tuple(sorted(sources, key=lambda source: source["name"]))


def _nothing_in(given: str, format: str, passed_over: PassedOver | None, names: OptionNames) -> UserError:
    holds = f"it holds {passed_over}" if passed_over else "it holds nothing"
    if not os.path.isdir(absolute(given)):
        return UserError(f"No file matches '{shown(given)}'.", where=shown(given), remedy="Correct the pattern.")
    return UserError(
        f"The folder holds no {'input' if format == 'auto' else format} files; {holds}.",
        where=shown(given),
        remedy=f"Known suffixes are {_KNOWN}. Other files: give them by name or glob, with {names('format')}.",
    )


def _describe(path: str, name: str, source: int) -> InputFile:
    if not os.access(path, os.R_OK):
        raise UserError(f"Cannot read '{shown(path)}'.", where=shown(path), remedy="Check its permissions.")
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise UserError(
            f"'{shown(path)}' is no regular file, and input is read more than once.",
            where=shown(path),
            remedy="Write what comes out of it to a file first.",
        )
    return InputFile(path, name, status.st_size, status.st_mtime_ns, source)


def _common_format(paths: Sequence[str], names: OptionNames) -> str:
    counts = Counter(format_of(path) for path in paths)
    if None in counts:
        unknown = next(path for path in paths if format_of(path) is None)
        raise UserError(
            f"Cannot tell the format of '{shown(os.path.basename(unknown))}' from its suffix.",
            where=shown(unknown),
            remedy=f"Give {names('format', 'text')} (or {', '.join(FORMATS[1:-1])}). Known suffixes are {_KNOWN}.",
        )
    if len(counts) > 1:
        found = ", ".join(f"{count} {name}" for name, count in sorted(counts.items(), key=str))
        raise UserError(
            f"The input mixes formats: {found} files.",
            where=names("input"),
            remedy=f"Prepare one format at a time; {names('format', 'parquet')}, for one, takes only the parquet files "
            "of a folder.",
        )
    return str(next(iter(counts)))
