"""The files behind a path, a glob or a folder; what is left out of a folder is counted, with the reason."""

from __future__ import annotations

import errno
import fnmatch
import glob
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tools.prepare.paths import shown
from trainer.errors import UserError, nearest

_LEADS_NOWHERE = (errno.ELOOP, errno.ENOENT, errno.ENOTDIR)
_READ_ANYWAY = "link to a folder that is read anyway or above"
Identity = tuple[int, int]
"""Device and inode: a folder by whatever path it is reached."""


@dataclass
class PassedOver:
    """Files and folders that were found and not read: how many for each reason."""

    counts: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        return self.counts.total()

    def __str__(self) -> str:
        """Write the reasons, such as "2 × .pdf, 1 × hidden"; the rare ones are added up."""
        common = self.counts.most_common(6)
        rest = self.total - sum(count for _, count in common)
        return ", ".join([f"{count:,} × {reason}" for reason, count in common] + [f"{rest:,} others"] * bool(rest))


@dataclass
class Walk:
    """A search for input files.

    Args:
        takes: None for the path of a file in a folder that is an input, else the reason to pass it over.
        excluded: folders that are not searched, such as the output.
    """

    takes: Callable[[str], str | None]
    excluded: Iterable[str] = ()
    passed_over: PassedOver = field(default_factory=PassedOver)

    def __post_init__(self) -> None:
        self._excluded = {identity for path in self.excluded if (identity := _identity(path))}

    def find(self, given: str, path: str) -> list[tuple[str, str]]:
        """Find the files behind one input, at the absolute `path`: (absolute path, name relative to what was given).

        Raises:
            UserError: when there is no such path, for a link that leads nowhere and a folder that cannot be listed.
        """
        if os.path.isdir(path):
            return list(self._below(path, self.takes))
        if os.path.exists(path):
            return [(path, os.path.basename(path))]
        if os.path.islink(path):
            raise _dead_link(path)
        if glob.has_magic(given):
            return list(self._matches(path))
        raise _no_such_path(given, path)

    def _matches(self, pattern: str) -> Iterator[tuple[str, str]]:
        """Find what a glob names. Below a `**` each folder is searched once: glob itself goes round where links do."""
        above, recursive, below = pattern.partition("/**")
        if recursive and (not below or below.startswith("/")):
            named = re.compile(_regex_of("**" + below))
            for folder in sorted(filter(os.path.isdir, glob.glob(above or "/"))):
                takes = self.takes if not below else lambda path, top=folder: _reason_by_name(named, path, top)
                yield from self._below(folder, takes)
            return
        for match in sorted(glob.glob(pattern)):
            if not os.path.isdir(match):
                if not os.path.exists(match):
                    raise _dead_link(match)
                if self._excluded and any(_identity(folder) in self._excluded for folder in Path(match).parents):
                    self.passed_over.counts["in the output"] += 1
                else:
                    yield match, os.path.basename(match)
            elif reason := self._reason_to_skip(match, [entry.name for entry in _entries_of(match)]):
                self.passed_over.counts[reason] += 1
            else:
                yield from self._below(match, self.takes)

    def _below(self, top: str, takes: Callable[[str], str | None]) -> Iterator[tuple[str, str]]:
        """Find the files below a folder, through links to folders as well; each folder is searched once."""
        above = {_identity(folder) for folder in Path(os.path.realpath(top)).parents}
        seen, folders, links = {_identity(top)}, [top], list[str]()
        while folders or links:
            if not folders:  # links come after all that is reached without them
                link = links.pop(0)
                identity = _identity(link)
                if identity in seen or identity in above:
                    self.passed_over.counts[_READ_ANYWAY] += 1
                    continue
                seen.add(identity)
                folders.append(link)
            folder = folders.pop()
            entries = _entries_of(folder)
            if folder != top and (reason := self._reason_to_skip(folder, [entry.name for entry in entries])):
                self.passed_over.counts[reason] += 1
                continue
            for entry in entries:
                if entry.name.startswith("."):
                    self.passed_over.counts["hidden"] += 1
                elif not _is_folder(entry):
                    reason = takes(entry.path) if entry.is_file() else "no regular file"
                    if reason is None:
                        yield entry.path, os.path.relpath(entry.path, top)
                    else:
                        self.passed_over.counts[reason] += 1
                elif entry.is_symlink():
                    links.append(entry.path)
                elif (identity := _identity(entry.path)) not in seen:
                    seen.add(identity)
                    folders.append(entry.path)
                else:  # a link led there before
                    self.passed_over.counts[_READ_ANYWAY] += 1

    def _reason_to_skip(self, folder: str, names: list[str]) -> str | None:
        """Say why a folder within an input is not searched: it is the output, or holds what a command wrote."""
        if _identity(folder) in self._excluded:
            return "the output"
        if "manifest.json" in names and any(name.endswith(".tok") for name in names):
            return "data set"
        if "tokenizer.json" in names and "tokenizer_config.json" in names:
            return "tokenizer"
        if "metrics.jsonl" in names and "checkpoints" in names:
            return "run"
        return None


def _regex_of(pattern: str) -> str:
    """Turn a glob into a regex for a path relative to its fixed part; `**` stands for any folders, or none."""
    *folders, last = pattern.split("/")
    parts = ["(?:.*/)?" if folder == "**" else fnmatch.translate(folder)[4:-3] + "/" for folder in folders]
    return "".join(parts) + (".*" if last == "**" else fnmatch.translate(last)[4:-3])


def _reason_by_name(named: re.Pattern[str], path: str, top: str) -> str | None:
    return None if named.fullmatch(os.path.relpath(path, top)) else "not of this pattern"


def _entries_of(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise _cannot_list(folder, error) from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Tell whether it is a folder, or a link to one; only a link costs a look at what it leads to."""
    if not entry.is_symlink():
        return entry.is_dir()
    try:
        return stat.S_ISDIR(os.stat(entry.path).st_mode)
    except OSError as error:
        if error.errno in _LEADS_NOWHERE:
            raise _dead_link(entry.path) from None
        raise _cannot_list(entry.path, error) from None


def _identity(path: str | os.PathLike[str]) -> Identity | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _cannot_list(path: str, error: OSError) -> UserError:
    return UserError(
        f"Cannot look into '{shown(path)}': {error.strerror}.",
        where=shown(path),
        remedy="Check its permissions, or take it out of the input.",
    )


def _dead_link(path: str) -> UserError:
    target = shown(os.readlink(path)) if os.path.islink(path) else "nothing"
    return UserError(
        f"'{shown(path)}' is a link to '{target}', which is not there.",
        where=shown(path),
        remedy="Mend or remove the link.",
    )


def _no_such_path(given: str, path: str) -> UserError:
    folder = Path(path).parent
    while not folder.is_dir():
        folder = folder.parent
    names = sorted(shown(name) for name in os.listdir(folder))
    hint = nearest(Path(path).name, names) if folder == Path(path).parent else ""
    missing = "" if folder == Path(path).parent else f" Its folder does not exist; the nearest is {shown(folder)}."
    return UserError(f"There is no '{shown(given)}'.{missing}{hint}", where=shown(given), remedy="Correct the path.")
