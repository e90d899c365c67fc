"""`maskwright bench loader`: tokens a second of one core, from the sample order to masked batches.

Every part runs in one process on one thread, over data in the page cache. The end-to-end variants are data loaders as
training uses them, without worker processes: what a worker does, and what the order costs, in one.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from tools.bench.common import BenchReport, Ratio, Variant, for_seconds, run_benchmark
from tools.bench.loader_work import LoaderBenchmark, Workload
from tools.bench.synthetic import make_tokenizer, write_random_shards
from tools.inspect import tokenizer_folder
from trainer.config import DataConfig, ObjectiveConfig, SourceConfig
from trainer.data.dataset import ShardSet
from trainer.data.manifest import WORD_STARTS, split_folder
from trainer.data.order.sample_order import SampleOrder, rank_share
from trainer.data.token_marks import check_marked
from trainer.data.tokenizer import load_tokenizer, read_vocabulary
from trainer.errors import UserError
from trainer.objectives.mlm import MaskedSamples
from trainer.schedule.batch_plan import BatchPlan

GLOBAL_SIZE = 8192  # sequences; RoBERTa's
_GATHERED_BATCHES = 16  # global batches whose blocks the gather variant goes through
_FOR_EVER = 1 << 40  # steps


def bench_loader(settings: LoaderBenchmark, console: Console) -> BenchReport:
    """Measure the parts of our loader, and other loaders beside it.

    Raises:
        UserError: when the data has too few blocks, or mosaicml-streaming is asked for and not installed.
    """
    import pyarrow
    import torch

    from tools.bench.loader_peers import peer_variants

    torch.set_num_threads(1)
    pyarrow.set_cpu_count(1)
    pinned = torch.cuda.is_available()
    with tempfile.TemporaryDirectory(prefix="maskwright-bench-") as scratch:
        workload = _open(settings, Path(scratch), console)
        peers, ratios, notes = peer_variants(workload, settings.against, console)
        facts = {
            **asdict(settings),
            "blocks": workload.shards.block_count(workload.objective.view.payload),
            "global_size": workload.plan.global_size,
            "pinned": pinned,
        }
        if workload.reads_words:
            ratios = [*ratios, Ratio("masks", "token masks"), Ratio("end to end", "token end to end")]
        sizes = f"scheme {settings.scheme}, seq_len {settings.seq_len}, batches of {settings.micro_size} sequences"
        memory = "pinned memory" if pinned else "memory not pinned (no CUDA device)"
        notes = [f"{sizes}, {memory}, one thread, data in the page cache", *notes]
        return run_benchmark("loader", facts, [*_variants(workload), *peers], ratios, notes, settings.rounds, console)


def _open(settings: LoaderBenchmark, scratch: Path, console: Console) -> Workload:
    if settings.data is None:
        console.print(f"Writing {settings.size_megabytes} MB of random tokens to {scratch}")
        folder = scratch / "shards"
        folder.mkdir()
        write_random_shards(folder, settings.size_megabytes * 1_000_000, words=settings.scheme != "token")
    else:
        folder = split_folder(settings.data, "train")
    shards = ShardSet(folder)
    kept = tokenizer_folder(folder)
    tokenizer = load_tokenizer(kept) if kept else make_tokenizer(shards.manifest.vocabulary_size)
    asked = ObjectiveConfig(scheme=settings.scheme)
    objective = MaskedSamples(asked, read_vocabulary(tokenizer, str(kept)), settings.seq_len)
    for mark in objective.marks:
        check_marked(folder, shards.manifest, mark)
    blocks, micro_size = shards.block_count(objective.view.payload), settings.micro_size
    if blocks < micro_size:
        raise UserError(
            f"The data has {blocks:,} blocks of {settings.seq_len}: not one batch of {micro_size}.",
            where=f"--data {settings.data}" if settings.data else f"--size {settings.size_megabytes}",
            remedy="Give more data, or lower --seq-len or --micro-size.",
        )
    accumulation, usual = max(1, GLOBAL_SIZE // micro_size), DataConfig(train=[SourceConfig(path=str(folder))])
    return Workload(
        shards=shards,
        tokenizer=tokenizer,
        objective=objective,
        order=SampleOrder([blocks], [1.0], 0, usual.chunk_blocks, usual.window_chunks),
        plan=BatchPlan(accumulation * micro_size, micro_size, 1, accumulation, settings.seq_len, _FOR_EVER),
        seconds=settings.seconds,
        scratch=scratch,
    )


def _variants(workload: Workload) -> list[Variant]:
    """Make our own variants; where words are masked, with those of single tokens to compare them with."""
    parts: list[tuple[str, str, Callable[[], int]]] = [
        ("order", f"SampleOrder.locate, {workload.plan.global_size:,} samples at a time", _order(workload)),
        ("gather", "ShardSet.read_blocks, sorted by address as a rank gets them", _gather(workload)),
        ("masks", "Masking.apply", _masks(workload)),
        ("end to end", "the training loader: order, rank share, gather, masks, tensors", _end_to_end(workload)),
    ]
    if workload.reads_words:
        objective = workload.objective
        single = replace(workload, objective=MaskedSamples(ObjectiveConfig(), objective.vocabulary, objective.seq_len))
        parts += [
            ("token masks", "the same for single tokens", _masks(single)),
            ("token end to end", "the same for single tokens", _end_to_end(single)),
        ]
    return [Variant(name, what, for_seconds(workload.seconds, step)) for name, what, step in parts]


def _order(workload: Workload) -> Callable[[], int]:
    size = workload.plan.global_size
    starts = itertools.count(0, size)

    def step() -> int:
        start = next(starts)
        workload.order.locate(np.arange(start, start + size))
        return size * workload.plan.seq_len

    return step


def _gather(workload: Workload) -> Callable[[], int]:
    batches = itertools.cycle(list(_micro_batches_of_blocks(workload)))
    payload = workload.objective.view.payload

    def step() -> int:
        return workload.shards.read_blocks(next(batches), payload).size

    return step


def _micro_batches_of_blocks(workload: Workload) -> Iterator[np.ndarray]:
    size = workload.plan.global_size
    for start in range(0, _GATHERED_BATCHES * size, size):
        samples = np.arange(start, start + size)
        sources, blocks = workload.order.locate(samples)
        yield from blocks[rank_share(samples, sources, blocks, 0, 1)].reshape(-1, workload.plan.micro_size)


def _masks(workload: Workload) -> Callable[[], int]:
    masking, micro_size = workload.objective.masking, workload.plan.micro_size
    framed = workload.read(np.arange(micro_size))
    words = framed.starts.get(WORD_STARTS)
    starts = itertools.count(0, micro_size)

    def step() -> int:
        start = next(starts)
        masking.apply(framed.tokens, np.arange(start, start + micro_size, dtype=np.uint64), 0, words)
        return framed.tokens.size

    return step


def _end_to_end(workload: Workload) -> Callable[[], int]:
    import torch

    from trainer.data.loader import SampledBlocks, TrainingBatches

    batches: Iterator[Any] = iter(
        TrainingBatches(
            workload.order,
            workload.plan,
            SampledBlocks([workload.shards], workload.objective, seed=0),
            rank=0,
            first_sample=0,
            steps=_FOR_EVER,
            workers=0,
            pin_memory=torch.cuda.is_available(),
        )
    )

    def step() -> int:
        return next(batches).inputs["input_ids"].numel()

    return step
