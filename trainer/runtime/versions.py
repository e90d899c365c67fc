"""Which versions of packages are installed."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version


@cache  # each look parses the whole description of a package
def installed_version(package: str) -> str | None:
    """Read a version as pip knows it; None when the package is not installed, as ours is not when run from a folder."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
