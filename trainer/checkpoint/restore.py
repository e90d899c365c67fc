"""Bring a checkpoint of any ZeRO stage and number of ranks into a live engine.

DeepSpeed refuses another number of ranks, and its universal checkpoint another stage. Here each rank reads, of each
parameter, the elements that it updates itself, straight from the files of whoever wrote them: nothing is reshaped on
disk, and no rank holds more than its own share.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

from trainer.checkpoint.zero_files import FragmentPlace, ZeroFiles
from trainer.engine.engine import TrainingEngine
from trainer.engine.partitions import WEIGHT
from trainer.runtime import distributed
from trainer.runtime.distributed import World

logger = logging.getLogger(__name__)


def restore(engine: TrainingEngine, folder: Path, world: World) -> None:
    """Load weights, optimizer state, buffers and loss scale; every rank calls it.

    What is trained now and was frozen starts with moments of nought; what is frozen now and was trained keeps its
    weights as they were.

    Raises:
        DamagedError: on every rank, when one of them cannot read what it needs.
    """
    start = time.perf_counter()
    # Each rank looks into a share of the files only, and tells the others what lies where.
    places = distributed.run_on_all_ranks(world, lambda: _index_share(folder, world))
    everywhere = [part for share in distributed.all_gather(world, places) for part in share]
    distributed.run_on_all_ranks(world, lambda: _read_share(engine, ZeroFiles(folder, everywhere)))
    engine.refresh_forward_weights()
    logger.info("restored %s in %.1f s", folder.name, time.perf_counter() - start)


def read_updates(folder: Path, world: World) -> dict[str, float]:
    """Read how many updates each parameter of a checkpoint has had; none of one that was frozen. Every rank calls it.

    Raises:
        DamagedError: on every rank, when it cannot be read.
    """
    found = distributed.run_on_all_ranks(world, lambda: ZeroFiles(folder, places=()).updates if world.is_main else {})
    return distributed.broadcast_from_main(world, found)


def _index_share(folder: Path, world: World) -> list[list[FragmentPlace]]:
    files = ZeroFiles(folder, places=())
    return [files.index(rank) for rank in range(world.rank, files.ranks, world.size)]


def _read_share(engine: TrainingEngine, files: ZeroFiles) -> None:
    partitions = engine.partitions
    for fragment in partitions.fragments():
        for kind, tensor in fragment.tensors.items():
            files.read_into(fragment.name, fragment.begin, tensor, kind)
    for fragment in partitions.frozen_fragments():
        files.read_into(fragment.name, fragment.begin, fragment.tensors[WEIGHT])
    for name, weight in engine.frozen.items():
        files.read_into(name, 0, weight.view(-1))
    partitions.set_updates(files.updates)
    engine.set_progress(files.buffers, files.counters, files.loss_scaler)
