"""Which token files are meant: paths, globs, prefixes and folders become one sorted list of sources of one format."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.import_tokens.datatrove import DatatroveFile
from tools.import_tokens.megatron import MegatronFile
from tools.import_tokens.source import TokenSource
from trainer.errors import UserError, nearest
from trainer.runtime.paths import absolute

FORMATS = ("megatron", "datatrove", "datasets")
_BESIDE_DS = (".ds.index", ".ds.metadata", ".ds.loss")
_KNOWN = "a Megatron X.bin with X.idx, a datatrove X.ds with X.ds.index, and a folder that Dataset.save_to_disk wrote"


@dataclass(frozen=True)
class FoundTokens:
    """What the user gave, opened. `described` has one entry for each path given, as the manifest records it."""

    format: str
    sources: tuple[TokenSource, ...]
    described: tuple[dict[str, Any], ...]

    @property
    def size(self) -> int:
        return sum(source.size for source in self.sources)


@dataclass(frozen=True)
class _Place:
    """Something to open: `path` is that of the .ds file, of the folder, or the prefix of .bin and .idx."""

    format: str
    path: str
    name: str


def find_sources(inputs: Sequence[str], format: str = "auto", field: str = "input_ids") -> FoundTokens:
    """Find and open all that is to be imported.

    Args:
        inputs: token files, prefixes of them, globs, and folders (searched recursively for token files).
        format: "auto", "megatron", "datatrove" or "datasets".
        field: the column of ids, for "datasets".

    Raises:
        UserError: for a path that is missing or holds nothing to import, and for several formats at once.
        DamagedError: for an index that does not fit its token file.
    """
    if format not in ("auto", *FORMATS):
        raise UserError(
            f"Unknown format '{format}'.{nearest(format, FORMATS)}",
            where=f"--from {format}",
            remedy=f"Choose one of auto, {', '.join(FORMATS)}.",
        )
    places: dict[str, tuple[_Place, int]] = {}
    for number, given in enumerate(inputs):
        for place in _expand(given, format):
            places.setdefault(place.path, (place, number))
    ordered = [places[path] for path in sorted(places)]
    formats = Counter(place.format for place, _ in ordered)
    if len(formats) > 1:
        found = ", ".join(f"{count} {name}" for name, count in sorted(formats.items()))
        raise UserError(
            f"The input mixes formats: {found}.", where="--input", remedy="Import one at a time; see --from."
        )
    opened = [(_open(place, field), number) for place, number in ordered]
    described = []
    for number, given in enumerate(inputs):
        own = [source for source, origin in opened if origin == number]
        name = os.path.basename(absolute(given, "--input"))
        described.append({"name": name, "files": len(own), "bytes": sum(source.size for source in own)})
    described.sort(key=lambda entry: entry["name"])
    return FoundTokens(next(iter(formats)), tuple(source for source, _ in opened), tuple(described))


def _open(place: _Place, field: str) -> TokenSource:
    if place.format == "megatron":
        return MegatronFile(place.path, place.name)
    if place.format == "datatrove":
        return DatatroveFile(place.path, place.name)
    from tools.import_tokens.dataset_folder import DatasetFolder

    return DatasetFolder(place.path, place.name, field)


def _expand(given: str, format: str) -> list[_Place]:
    """Find what one input means; at least one place."""
    path = absolute(given, "--input")
    if os.path.isdir(path):
        return _in_folder(path, format)
    if os.path.isfile(path) or os.path.isfile(path + ".idx"):
        place = _place_of_file(path, os.path.basename(path))
        if place is None or format not in ("auto", place.format):
            raise UserError(
                f"'{os.path.basename(path)}' is not a file that can be imported"
                + (f" from {format}." if format != "auto" else "."),
                where=path,
                remedy=f"Known are {_KNOWN}.",
            )
        return [place]
    if glob.has_magic(given):
        matches = sorted(glob.glob(path, recursive=True))
        places: list[_Place] = []
        for match in matches:
            places += _in_folder(match, format) if os.path.isdir(match) else _of_format([match], format)
        if not places:
            problem = "holds nothing to import" if matches else "matches no file"
            raise UserError(f"'{given}' {problem}.", where=given, remedy=f"Known are {_KNOWN}.")
        return places
    folder = Path(path).parent
    hint = nearest(Path(path).name, sorted(os.listdir(folder))) if folder.is_dir() else " Its folder does not exist."
    raise UserError(f"There is no '{given}'.{hint}", where=given, remedy="Correct the path.")


def _in_folder(folder: str, format: str) -> list[_Place]:
    """Find token files and data sets of `datasets` in a folder, and in the folders in it; or the folder itself."""
    places, others = [], Counter()
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if format in ("auto", "datasets"):
            if "dataset_dict.json" in names and folders:
                raise _several_splits(where, folders)
            if "state.json" in names and "dataset_info.json" in names:
                places.append(_Place("datasets", where, os.path.relpath(where, os.path.dirname(folder))))
                folders.clear()
                continue
        files = [os.path.join(where, name) for name in sorted(names) if not name.startswith(".")]
        places += _of_format(files, format, folder)
        others.update(Path(file).suffix or "no suffix" for file in files)
    if not places:
        holds = ", ".join(f"{count} × {suffix}" for suffix, count in others.most_common(5)) or "nothing"
        raise UserError(
            f"The folder holds nothing to import{'' if format == 'auto' else f' from {format}'}; it holds {holds}.",
            where=folder,
            remedy=f"Known are {_KNOWN}. Text is tokenized with `maskwright prepare`.",
        )
    return places


def _several_splits(folder: str, splits: list[str]) -> UserError:
    return UserError(
        f"'{os.path.basename(folder)}' holds several splits: {', '.join(splits)}.",
        where=folder,
        remedy=f"Give the one to import, such as {os.path.join(folder, 'train' if 'train' in splits else splits[0])}.",
    )


def _of_format(files: Iterable[str], format: str, folder: str | None = None) -> list[_Place]:
    """Find the token files among `files`; a file that only belongs to one counts as it."""
    places = []
    for file in files:
        place = _place_of_file(file, os.path.relpath(file, folder) if folder else os.path.basename(file))
        if place is not None and format in ("auto", place.format):
            places.append(place)
    return places


def _place_of_file(path: str, name: str) -> _Place | None:
    for suffix in (".idx", ".bin"):
        if path.endswith(suffix):
            return _Place("megatron", path.removesuffix(suffix), name.removesuffix(suffix))
    if path.endswith(".ds"):
        return _Place("datatrove", path, name)
    for suffix in _BESIDE_DS:
        if path.endswith(suffix) and os.path.isfile(owner := path[: len(path) - len(suffix)] + ".ds"):
            return _Place("datatrove", owner, name[: len(name) - len(suffix)] + ".ds")
    if os.path.isfile(path + ".idx"):
        return _Place("megatron", path, name)
    return None
