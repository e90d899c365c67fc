"""Distinct values of large integer arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def distinct(values: NDArray[Any]) -> NDArray[Any]:
    """Find the different values of an integer array [n], ascending.

    By sorting: since numpy 2.3 np.unique hashes integers, and takes several times as long for a million of them.
    """
    ascending = np.sort(values)
    return ascending[np.flatnonzero(np.diff(ascending, prepend=ascending[:1] + 1))]
