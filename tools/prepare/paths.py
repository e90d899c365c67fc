"""Paths are bytes: how one that is not UTF-8 is written into messages and records."""

from __future__ import annotations

import os


def shown(path: str | os.PathLike[str]) -> str:
    """Write the path as valid text: bytes that are not UTF-8 stand as \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
