"""What a rank really reads from disk: the pages of its share of a window, and hardly any other."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.page_cache import drop_pages, drops_pages, resident_pages
from tools.bench import synthetic
from tools.simulate.locality import PAGE_BYTES, pages_of_samples
from tools.simulate.plan import SimulateOptions, plan_simulation
from trainer.data.dataset import ShardSet
from trainer.data.order.sample_order import rank_share

RANKS, GLOBAL_SIZE, SEED = 8, 2048, 3
CHUNK_BLOCKS, WINDOW_CHUNKS = 256, 64
DATA_BYTES, SHARD_BYTES = 20_000_000, 6_000_000


@pytest.fixture
def on_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk: that of the test, or one in the checkout where the first is in memory."""
    with tempfile.TemporaryDirectory(dir=Path(__file__).parent, prefix=".on-disk-") as in_checkout:
        for folder in (tmp_path, Path(in_checkout)):
            if drops_pages(folder):
                yield folder
                return
        pytest.skip("neither the temporary folder nor the checkout is on a disk whose pages can be dropped")


@pytest.mark.parametrize("rank", [0, 5])
def test_a_rank_reads_its_pages_of_a_window_and_hardly_any_other(
    rank: int, on_disk: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(synthetic, "SHARD_BYTES", SHARD_BYTES)
    synthetic.write_random_shards(on_disk, DATA_BYTES)
    options = SimulateOptions(global_size=GLOBAL_SIZE, ranks=RANKS, seed=SEED)
    plan = plan_simulation(str(on_disk), [], options)
    sizes = {"chunk_blocks": CHUNK_BLOCKS, "window_chunks": WINDOW_CHUNKS}
    plan = replace(plan, data=plan.data.model_copy(update=sizes))
    order, token_files = plan.order(), sorted(on_disk.glob("*.tok"))
    assert len(token_files) > 2
    window = np.arange(CHUNK_BLOCKS * WINDOW_CHUNKS).reshape(-1, GLOBAL_SIZE)

    shards = ShardSet(on_disk)
    drop_pages(token_files)
    assert not any(resident_pages(path).any() for path in token_files)
    used_bytes = 0
    for samples in window:
        sources, blocks = order.locate(samples)
        share = rank_share(samples, sources, blocks, rank, RANKS)
        used_bytes += shards.read_blocks(blocks[share], plan.payload(0)).nbytes
    held = np.concatenate([resident_pages(path) for path in token_files])

    first, last = pages_of_samples(plan, order, window)
    own = slice(rank * GLOBAL_SIZE // RANKS, (rank + 1) * GLOBAL_SIZE // RANKS)
    expected = np.zeros_like(held)
    expected[first[:, own]] = expected[last[:, own]] = True
    assert np.array_equal(held, expected), f"{held.sum()} pages read, {expected.sum()} needed"
    assert held.sum() * PAGE_BYTES / used_bytes <= 1.2
