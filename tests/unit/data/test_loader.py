"""The loader: the same batches for any number of ranks, workers and micro-batches, and from any step on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.unit.data.test_borders import starts_in
from tests.unit.data.test_shards import write_data_set
from trainer.config import ObjectiveConfig
from trainer.data.batch import Batch
from trainer.data.blocks import Blocks
from trainer.data.dataset import ShardSet
from trainer.data.loader import SampledBlocks, TrainingBatches
from trainer.data.order.sample_order import SampleOrder
from trainer.data.tokenizer import Vocabulary
from trainer.errors import DamagedError
from trainer.objectives.framing import frame_tokens
from trainer.objectives.mlm import MaskedSamples
from trainer.schedule.batch_plan import BatchPlan

SEQ_LEN, GLOBAL_SIZE, SEED = 18, 12, 5
VOCABULARY = Vocabulary(
    size=1000,
    begin_id=0,
    end_id=2,
    separator_id=2,
    mask_id=3,
    pad_id=1,
    special_ids=(0, 1, 2, 3),
    sha256="0" * 64,
)
OBJECTIVE = MaskedSamples(ObjectiveConfig(), VOCABULARY, SEQ_LEN)
WITH_DOCUMENTS = MaskedSamples(ObjectiveConfig(), VOCABULARY, SEQ_LEN, document_attention=True)


class RecordingShards(ShardSet):
    """Notes which blocks are asked for (in this process)."""

    blocks: list[int]

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        self.blocks = [*getattr(self, "blocks", []), *(starts // length).tolist()]
        return super().read(starts, length)


def two_sources() -> list[list[list[list[int]]]]:
    """The documents of two sources of two shards each, with blocks that cross the border."""
    generator = np.random.default_rng(0)
    sources = []
    for documents in (60, 40):
        made = [generator.integers(4, 1000, generator.integers(5, 80)).tolist() for _ in range(documents)]
        sources.append([made[: documents // 3], made[documents // 3 :]])
    return sources


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folders = [tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("source")]
    for folder, shards in zip(folders, two_sources(), strict=True):
        write_data_set(folder, shards)
    return folders


def order_of(sources: Sequence[ShardSet]) -> SampleOrder:
    blocks = [source.block_count(OBJECTIVE.view.payload) for source in sources]
    return SampleOrder(blocks, [2.0, 1.0][: len(blocks)], SEED, chunk_blocks=8, window_chunks=4)


def batches_of(
    sources: list[ShardSet],
    *,
    rank: int = 0,
    world_size: int = 1,
    micro_size: int = GLOBAL_SIZE,
    workers: int = 0,
    first_sample: int = 0,
    steps: int = 3,
    document_attention: bool = False,
) -> list[Batch]:
    accumulation = GLOBAL_SIZE // (micro_size * world_size)
    plan = BatchPlan(GLOBAL_SIZE, micro_size, world_size, accumulation, SEQ_LEN, total_steps=100)
    dataset = SampledBlocks(sources, WITH_DOCUMENTS if document_attention else OBJECTIVE, SEED)
    found = TrainingBatches(
        order_of(sources),
        plan,
        dataset,
        rank=rank,
        first_sample=first_sample,
        steps=steps,
        workers=workers,
        pin_memory=False,
    )
    batches = list(found)
    assert len(batches) == steps * accumulation
    assert all(batch.inputs["input_ids"].shape == (micro_size, SEQ_LEN) for batch in batches)
    return batches


def rows_by_step(batches: list[Batch], steps: int) -> list[list[tuple[tuple[int, ...], ...]]]:
    """For each step the masked ids, predicted positions (in the block) and labels of every block, in address order."""
    per_step = len(batches) // steps
    result = []
    for step in range(steps):
        rows = []
        for batch in batches[step * per_step : (step + 1) * per_step]:
            size = len(batch.inputs["input_ids"])
            index = batch.prediction_index.view(size, -1) - SEQ_LEN * torch.arange(size)[:, None]
            for ids, places, labels in zip(
                batch.inputs["input_ids"].tolist(),
                index.tolist(),
                batch.labels["mlm"].view(size, -1).tolist(),
                strict=True,
            ):
                rows.append((tuple(ids), tuple(places), tuple(labels)))
        result.append(rows)
    return result


def global_rows(
    folders: list[Path], world_size: int, micro_size: int, workers: int = 0, first_sample: int = 0, steps: int = 3
) -> list[list[tuple[tuple[int, ...], ...]]]:
    """The global batches that all ranks make up together, ranks in order."""
    by_rank = [
        rows_by_step(
            batches_of(
                [ShardSet(folder) for folder in folders],
                rank=rank,
                world_size=world_size,
                micro_size=micro_size,
                workers=workers,
                first_sample=first_sample,
                steps=steps,
            ),
            steps,
        )
        for rank in range(world_size)
    ]
    return [[row for rows in by_rank for row in rows[step]] for step in range(steps)]


@pytest.fixture(scope="module")
def reference(folders: list[Path]) -> list[list[tuple[tuple[int, ...], ...]]]:
    return global_rows(folders, 1, GLOBAL_SIZE)


@pytest.mark.parametrize(
    ("world_size", "micro_size", "workers"),
    [(1, 1, 0), (1, 3, 1), (1, 4, 4), (1, 12, 1), (2, 1, 0), (2, 3, 1), (2, 6, 4), (3, 2, 0), (3, 4, 1), (12, 1, 0)],
)
def test_ids_masks_and_labels_do_not_depend_on_ranks_workers_or_micro_batches(
    world_size: int,
    micro_size: int,
    workers: int,
    folders: list[Path],
    reference: list[list[tuple[tuple[int, ...], ...]]],
):
    assert global_rows(folders, world_size, micro_size, workers) == reference


@pytest.mark.parametrize("step", [1, 2, 7, 10**9])
@pytest.mark.parametrize(("world_size", "micro_size", "workers"), [(1, 12, 0), (2, 2, 1)])
def test_a_restart_goes_on_from_any_step(
    step: int, world_size: int, micro_size: int, workers: int, folders: list[Path]
):
    before = global_rows(folders, 1, 4, first_sample=(step - 1) * GLOBAL_SIZE, steps=3)
    after = global_rows(folders, world_size, micro_size, workers, first_sample=step * GLOBAL_SIZE, steps=2)
    assert after == before[1:]


def test_a_batch_is_what_order_and_shards_say(folders: list[Path]):
    """From the definition: sample t's block, framed, masked with t's key."""
    sources = [ShardSet(folder) for folder in folders]
    samples = np.arange(3 * GLOBAL_SIZE)
    chosen, blocks = order_of(sources).locate(samples)
    assert set(chosen.tolist()) == {0, 1}
    expected = {}
    for t, source, block in zip(samples.tolist(), chosen.tolist(), blocks.tolist(), strict=True):
        tokens = sources[source].read_blocks(np.array([block]), OBJECTIVE.view.payload)
        one = OBJECTIVE.make_batch(Blocks(tokens), np.array([t], np.uint64), SEED)
        expected[tuple(one.inputs["input_ids"][0].tolist())] = one.labels["mlm"].tolist()
        assert (
            one.inputs["input_ids"][0, 0] == VOCABULARY.begin_id and one.inputs["input_ids"][0, -1] == VOCABULARY.end_id
        )
    found = {ids: list(labels) for rows in global_rows(folders, 2, 3) for ids, _, labels in rows}
    assert found == expected


@pytest.mark.parametrize(
    ("world_size", "micro_size", "workers"), [(1, 12, 0), (1, 3, 1), (2, 2, 0), (2, 6, 1), (3, 4, 0)]
)
def test_positions_restart_at_each_document_for_any_ranks_workers_and_micro_batches(
    world_size: int, micro_size: int, workers: int, folders: list[Path]
):
    """From the definition: each token's distance from the start of its document, or of what the block has of it."""
    payload, expected = OBJECTIVE.view.payload, {}
    for shards, folder in zip(two_sources(), folders, strict=True):
        starts, data = starts_in(shards), ShardSet(folder)
        for block in range(data.block_count(payload)):
            inside = [0, *(1 + place for place in range(1, payload) if starts[block * payload + place])]
            positions = [place - max(start for start in inside if start <= place) for place in range(SEQ_LEN)]
            tokens = frame_tokens(data.read_blocks(np.array([block]), payload), VOCABULARY)[0]
            expected[tuple(tokens.tolist())] = positions
    borders = 0
    for rank in range(world_size):
        options = {"rank": rank, "world_size": world_size, "micro_size": micro_size, "workers": workers}
        sources = [ShardSet(folder) for folder in folders]
        for batch in batches_of(sources, **options, document_attention=True):
            original = batch.inputs["input_ids"].clone().view(-1)
            original[batch.prediction_index] = batch.labels["mlm"]
            documents = batch.documents
            assert documents is not None
            for ids, positions in zip(original.view(micro_size, SEQ_LEN), documents.positions, strict=True):
                assert positions.tolist() == expected[tuple(ids.tolist())]
            first = np.flatnonzero(documents.positions.numpy() == 0)
            assert documents.cu_seqlens[: len(first)].tolist() == first.tolist()
            assert set(documents.cu_seqlens[len(first) :].tolist()) == {micro_size * SEQ_LEN}
            borders += len(first) - micro_size
    assert borders > GLOBAL_SIZE


def test_without_document_attention_no_border_is_read(tmp_path: Path):
    write_data_set(tmp_path, [[[5] * 20] * 20])
    sources = [ShardSet(tmp_path)]
    (tmp_path / "shard-00000.doc").unlink()
    assert all(batch.documents is None for batch in batches_of(sources, steps=1))
    with pytest.raises(DamagedError, match=r"shard-00000\.doc is missing"):
        batches_of(sources, steps=1, document_attention=True)


def test_blocks_that_cross_from_one_shard_into_the_next_are_among_those_read(folders: list[Path]):
    data = RecordingShards(folders[0])
    batches_of([data], steps=40)
    border = data.manifest.shards[0].tokens
    assert border % OBJECTIVE.view.payload, "the border lies within a block"
    assert border // OBJECTIVE.view.payload in data.blocks


def test_each_block_comes_once_an_epoch(folders: list[Path]):
    data = RecordingShards(folders[0])
    count = data.block_count(OBJECTIVE.view.payload)
    batches_of([data], steps=count)  # as many epochs as a batch has blocks
    assert sorted(data.blocks) == sorted(list(range(count)) * GLOBAL_SIZE)


def test_resuming_at_a_trillion_samples_reads_only_the_blocks_of_the_next_batch(folders: list[Path]):
    data = RecordingShards(folders[0])
    first_sample = 10**12 // GLOBAL_SIZE * GLOBAL_SIZE
    batches_of([data], first_sample=first_sample, steps=1)
    _, blocks = order_of([data]).locate(np.arange(first_sample, first_sample + GLOBAL_SIZE))
    assert sorted(data.blocks) == sorted(blocks.tolist())


def test_every_prediction_counts_in_ordinary_text(folders: list[Path]):
    for batch in batches_of([ShardSet(folders[0])]):
        assert batch.count("mlm") == GLOBAL_SIZE * OBJECTIVE.head_rows


def test_a_source_of_another_size_than_recorded_is_damage(tmp_path: Path):
    write_data_set(tmp_path, [[[5] * 100]])
    os.truncate(tmp_path / "shard-00000.tok", 100)
    with pytest.raises(DamagedError, match=r"shard-00000.tok has 100 bytes; its manifest says 202"):
        batches_of([ShardSet(tmp_path)])
