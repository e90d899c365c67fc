"""Which files are read, and as what: paths, globs and folders become one sorted list of files of one format."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import UserError, nearest
from trainer.paths import absolute

COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
FORMAT_OF_SUFFIX = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
FORMATS = ("text", "jsonl", "csv", "parquet", "arrow", "hub")
TEXT_DOCUMENTS = ("paragraph", "line", "file")
_KNOWN = ", ".join(FORMAT_OF_SUFFIX) + "; each may end in " + ", ".join(COMPRESSIONS)


@dataclass(frozen=True)
class InputFile:
    """One input. `name` is relative to what the user gave; `parts` > 1 only for hub data sets (their shards)."""

    path: str
    name: str
    size: int
    mtime_ns: int
    source: int
    parts: int = 1
    revision: str = ""

    @property
    def compressed(self) -> bool:
        return Path(self.path).suffix.lower() in COMPRESSIONS


@dataclass(frozen=True)
class Inputs:
    """Files of one format, sorted by path; `sources` has one entry for each input the user gave."""

    format: str
    files: tuple[InputFile, ...]
    sources: tuple[dict[str, Any], ...]

    @property
    def size(self) -> int:
        """Bytes on disk, as stored; 0 for a hub data set that does not say."""
        return sum(file.size for file in self.files)


def find_inputs(inputs: Sequence[str], format: str = "auto") -> Inputs:
    """Expand paths, globs and folders (recursively, files with a known suffix).

    Raises:
        UserError: for a missing path, a folder or glob without files, an unknown suffix, or several formats at once.
    """
    if not inputs:
        raise UserError("No input was given.", where="--input", remedy="Give files, folders or globs with --input.")
    if format not in ("auto", *FORMATS):
        raise UserError(
            f"Unknown format '{format}'.{nearest(format, FORMATS)}",
            where=f"--format {format}",
            remedy=f"Choose one of auto, {', '.join(FORMATS)}.",
        )
    if format == "hub":
        from tools.prepare.tables import find_hub_inputs

        return find_hub_inputs(inputs)
    found: dict[str, tuple[str, int]] = {}
    for source, given in enumerate(inputs):
        for path, name in _expand(given, format):
            found.setdefault(path, (name, source))
    files = tuple(_describe(path, *found[path]) for path in sorted(found))
    chosen = format if format != "auto" else _common_format([file.path for file in files])
    if not sum(file.size for file in files):
        raise UserError(
            f"The input is empty: {len(files)} file{'s' if len(files) > 1 else ''} of 0 bytes.",
            where=", ".join(inputs),
            remedy="Give files that hold text.",
        )
    sources = []
    for number, given in enumerate(inputs):
        own = [file for file in files if file.source == number]
        name = os.path.basename(absolute(given, "--input"))
        sources.append({"name": name, "files": len(own), "bytes": sum(file.size for file in own)})
    return Inputs(chosen, files, tuple(sorted(sources, key=lambda source: source["name"])))


def resolve_documents(documents: str | None, format: str) -> str:
    """What one document is: `documents` when it fits the format, else the format's default."""
    allowed = TEXT_DOCUMENTS if format == "text" else ("row",)
    if documents is None:
        return allowed[0]
    if documents not in allowed:
        raise UserError(
            f"Documents of {format} input cannot be '{documents}'.",
            where=f"--documents {documents}",
            remedy=f"Choose {' or '.join(allowed)}.",
        )
    return documents


def format_of(path: str) -> str | None:
    """The format that a file name stands for; a name without a suffix is text, an unknown suffix None."""
    suffix = _suffix(path)
    return FORMAT_OF_SUFFIX.get(suffix) if suffix else "text"


def _suffix(path: str) -> str:
    bare = Path(path)
    if bare.suffix.lower() in COMPRESSIONS:
        bare = bare.with_suffix("")
    return bare.suffix.lower()


def _expand(given: str, format: str) -> Iterable[tuple[str, str]]:
    """(absolute path, name relative to what was given) of the files behind one input."""
    path = absolute(given, "--input")
    if os.path.isdir(path):
        return _files_in_folder(path, format)
    if os.path.exists(path):
        return [(path, os.path.basename(path))]
    if glob.has_magic(given):
        matches = sorted(glob.glob(path, recursive=True))
        files: list[tuple[str, str]] = []
        for match in matches:
            files += _files_in_folder(match, format) if os.path.isdir(match) else [(match, os.path.basename(match))]
        if not files:
            raise UserError(f"No file matches '{given}'.", where=given, remedy="Correct the pattern.")
        return files
    folder = Path(path).parent
    while not folder.is_dir():
        folder = folder.parent
    names = sorted(os.listdir(folder))
    hint = nearest(Path(path).name, names) if folder == Path(path).parent else ""
    missing = "" if folder == Path(path).parent else f" Its folder does not exist; the nearest is {folder}."
    raise UserError(f"There is no '{given}'.{missing}{hint}", where=given, remedy="Correct the path.")


def _files_in_folder(folder: str, format: str) -> list[tuple[str, str]]:
    """Visible files below `folder` whose suffix is known (and of `format`, unless that is auto)."""
    files, others = [], Counter()
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            suffix, found = _suffix(name), format_of(name)
            if suffix and not name.startswith(".") and found and format in ("auto", found):
                path = os.path.join(where, name)
                files.append((path, os.path.relpath(path, folder)))
            else:
                others[suffix or "no suffix"] += 1
    if not files:
        holds = ", ".join(f"{count} × {suffix}" for suffix, count in others.most_common(5)) or "nothing"
        raise UserError(
            f"The folder holds no {'input' if format == 'auto' else format} files; it holds {holds}.",
            where=folder,
            remedy=f"Known suffixes are {_KNOWN}. Other files: give them by name or glob, with --format.",
        )
    return files


def _describe(path: str, name: str, source: int) -> InputFile:
    if not os.access(path, os.R_OK):
        raise UserError(f"Cannot read '{path}'.", where=path, remedy="Check its permissions.")
    status = os.stat(path)
    return InputFile(path, name, status.st_size, status.st_mtime_ns, source)


def _common_format(paths: Sequence[str]) -> str:
    counts = Counter(format_of(path) for path in paths)
    if None in counts:
        unknown = next(path for path in paths if format_of(path) is None)
        raise UserError(
            f"Cannot tell the format of '{os.path.basename(unknown)}' from its suffix.",
            where=unknown,
            remedy=f"Give --format text (or {', '.join(FORMATS[1:-1])}). Known suffixes are {_KNOWN}.",
        )
    if len(counts) > 1:
        found = ", ".join(f"{count} {name}" for name, count in sorted(counts.items(), key=str))
        raise UserError(
            f"The input mixes formats: {found} files.",
            where="--input",
            remedy="Prepare one format at a time; --format parquet, for one, takes only the parquet files of a folder.",
        )
    return str(next(iter(counts)))
