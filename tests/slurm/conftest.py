from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import SlurmCluster, missing_commands


@pytest.fixture(scope="session")
def cluster() -> Iterator[SlurmCluster]:
    """A real SLURM of two nodes with two cores each; skips where SLURM is not installed."""
    if missing := missing_commands():
        pytest.skip(f"SLURM is not installed (no {', '.join(missing)}): apt-get install slurm-wlm munge")
    started = SlurmCluster()
    try:
        started.start()
        yield started
    finally:
        started.stop()
