"""What `maskwright train` is told about several nodes, and what its ranks import."""

from __future__ import annotations

import gc

import pytest

from launcher.local import Nodes
from launcher.start import DEFAULT_MASTER_PORT, ProcessOptions, _imports_kept
from trainer.errors import UserError


def test_alone_unless_told_of_nodes() -> None:
    assert ProcessOptions().nodes() is None
    assert ProcessOptions(process_count=8).nodes() is None


def test_a_place_among_nodes() -> None:
    given = ProcessOptions(8, node_count=2, node_rank=1, master_address="127.0.0.1")
    assert given.nodes() == Nodes(2, 1, "127.0.0.1", DEFAULT_MASTER_PORT)
    given = ProcessOptions(None, node_count=2, node_rank=0, master_address="localhost", master_port=4000)
    assert given.nodes() == Nodes(2, 0, "localhost", 4000)


@pytest.mark.parametrize(
    ("options", "where"),
    [
        (ProcessOptions(node_count=2), "--node-rank, --master-addr"),
        (ProcessOptions(node_rank=0), "--nnodes, --master-addr"),
        (ProcessOptions(master_port=4000), "--nnodes, --node-rank, --master-addr"),
        (ProcessOptions(node_count=2, node_rank=2, master_address="127.0.0.1"), "--node-rank"),
        (ProcessOptions(node_count=2, node_rank=0, master_address="no such host"), "--master-addr"),
    ],
    ids=str,
)
def test_what_is_missing_or_wrong_is_named(options: ProcessOptions, where: str) -> None:
    with pytest.raises(UserError) as caught:
        options.nodes()
    assert caught.value.where == where
    assert caught.value.remedy


def test_what_a_rank_imports_is_never_searched_for_garbage() -> None:
    gc.unfreeze()
    try:
        with _imports_kept():
            kept = [[] for _ in range(10_000)]
            assert not gc.isenabled()
        assert gc.isenabled()
        assert gc.get_freeze_count() > len(kept)
    finally:
        gc.unfreeze()
