"""Paths that users give: expanded and looked at in one place, so that each that cannot be meant is one card."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from pathlib import Path

from trainer.errors import UserError
from trainer.runtime.plain_text import has_control

_NAME_BYTES = 255  # NAME_MAX of Linux's file systems
_PATH_BYTES = 3800  # PATH_MAX, less what is made inside a folder
_OUTPUT_NAME_BYTES = 180  # a folder that is written under a longer, temporary name first
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR)


def user_path(given: str | Path, where: str = "") -> Path:
    """Return the path that a user means, with `~` expanded; it need not be there.

    Args:
        where: the config key or option that gives it; empty where only the path itself is known.

    Raises:
        UserError: for an empty text, control characters, a home that is unknown, a name that is too long, symbolic
            links that go round in a circle, and a place that may not be looked at.
    """
    path = expanded(given, where)
    check_reachable(path, given, where)
    return path


def expanded(given: str | Path, where: str = "") -> Path:
    """Return the path that a user means, with `~` expanded, without looking at the disk.

    Raises:
        UserError: as `user_path`, for all that the text alone tells.
    """
    text = os.fspath(given)
    if not text:
        raise _refused("The path is empty.", text, where, "Give a path; `.` is the current folder.")
    if has_control(text):
        problem = "A path must be one line, without control characters."
        raise _refused(problem, text, where, "Correct it, or rename the file.")
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        name = Path(text).parts[0]
        remedy = f"Correct it, or write ./{name} for a file of that name."
        raise _refused(f"No home folder is known for '{name}'.", text, where, remedy) from None
    longest = max((len(os.fsencode(part)) for part in path.parts), default=0)
    if longest > _NAME_BYTES or len(os.fsencode(path)) > _PATH_BYTES:
        raise _refused("The path is too long.", text, where, f"Names have at most {_NAME_BYTES} bytes.")
    return path


def check_reachable(path: Path, given: str | Path, where: str = "") -> None:
    """Refuse a path that cannot be looked at; one where nothing is passes.

    Raises:
        UserError: with what the system says.
    """
    try:
        path.stat()
    except OSError as error:
        if error.errno in _NOT_THERE:
            return
        if error.errno == errno.ELOOP:
            problem, remedy = "Its symbolic links go round in a circle.", "Correct the links, or give another path."
        else:
            problem, remedy = f"Cannot look at the path: {error.strerror}.", "Check its permissions and its disk."
        raise _refused(problem, os.fspath(given), where, remedy) from None


def real_path(path: str | Path) -> Path:
    """Return the absolute path without symbolic links; where these go round in a circle, as far as they lead."""
    return Path(os.path.realpath(path))


def absolute(given: str, where: str = "") -> str:
    """Return the absolute path that a user means as text; symbolic links, globs and a missing file stay as they are."""
    return os.path.abspath(expanded(given, where))


def new_folder(given: str | Path, where: str = "--output") -> Path:
    """Return the path of a folder that is to be made under another name and then renamed; makes the folder above it.

    Raises:
        UserError: when it could not be renamed into its place: it is there and not empty, a symbolic link or the
            current folder, or the folder above it cannot be written to.
    """
    path, text = user_path(given, where), os.fspath(given)
    remedy = f"Choose another {where}."
    if path.is_symlink():
        raise _refused(f"'{path}' is a symbolic link.", text, where, "Give the folder itself.")
    if path.name in ("", "..") or real_path(path) == real_path("."):
        raise _refused(f"'{text}' is a folder that is in use.", text, where, "Give the name of a new folder.")
    if len(os.fsencode(path.name)) > _OUTPUT_NAME_BYTES:
        raise _refused("The name is too long.", text, where, f"Give one of at most {_OUTPUT_NAME_BYTES} bytes.")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        problem = f"'{path}' exists already" + (" and is not empty." if path.is_dir() else ": a file.")
        raise _refused(problem, text, where, f"Choose another {where}, or remove it.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _refused(f"Cannot create '{path.parent}': {error.strerror}.", text, where, remedy) from None
    check_writable(path.parent, text, where)
    return path


def check_writable(folder: Path, given: str, where: str) -> None:
    """Refuse a folder in which no file can be written: read-only, full, or of a kind that holds none.

    Raises:
        UserError: with what the system says.
    """
    try:
        descriptor, name = tempfile.mkstemp(prefix=".maskwright-", dir=folder)
        try:
            os.write(descriptor, b"\0")
        finally:
            os.close(descriptor)
            with contextlib.suppress(OSError):
                os.unlink(name)
    except OSError as error:
        remedy = f"Choose another {where}, or make room and see to its permissions."
        raise _refused(f"Cannot write to '{folder}': {error.strerror}.", given, where, remedy) from None


def is_local(name: str | Path) -> bool:
    """Tell whether the name of a Hugging Face folder means a path on this machine, and not a name on the hub.

    `org/name` is a hub name unless there is a folder `org` here: a mistyped path then fails at once, instead of
    after the hub's retries.
    """
    path, text = user_path(name), str(name)
    return (
        path.is_absolute()
        or text.startswith((".", "~"))
        or text.count("/") > 1
        or path.exists()
        or ("/" in text and path.parent.is_dir())
    )


def _refused(problem: str, given: str, where: str, remedy: str) -> UserError:
    place = f"{where} {given}" if where.startswith("-") else f"{where}={given}" if where else given
    return UserError(problem, where=place or "an empty path", remedy=remedy)
