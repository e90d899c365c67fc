"""What is simulated: data sets on paper or as their manifests describe them, and a run over them."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from trainer.checkpoint.begun import as_begun
from trainer.config import BatchConfig, DataConfig
from trainer.config.base import LIMIT
from trainer.config.file import load_config, recipe_names
from trainer.data.blocks import View, framed_view
from trainer.data.manifest import (
    MANIFEST,
    SUM_BYTES,
    Manifest,
    ShardEntry,
    read_data_manifest,
    split_folder,
    token_dtype,
)
from trainer.data.order.mixture import mixture_order
from trainer.data.order.run_order import RunOrder
from trainer.data.quarantine import kept_stretches
from trainer.errors import UserError
from trainer.objectives.registry import view_of
from trainer.runtime.paths import user_path
from trainer.schedule.batch_plan import BatchPlan, Stretch, plan_batch
from trainer.schedule.phases import Phases, lay_out
from trainer.schedule.run_length import find_defaults

MOST_RANKS = 4096  # simulated without being asked
USUAL_GLOBAL_SIZE = 8192  # sequences; RoBERTa's
USUAL_STEPS = 1000
PAPER_TOKENS, PAPER_SHARDS, PAPER_VOCABULARY = 10**13, 20_000, 50_265
_NO_HASH = "0" * 32
_BOUNDS = {
    "tokens": (1, LIMIT - 1),
    "shards": (1, 2**18),  # each has an entry in a manifest
    "vocabulary_size": (1, 2**32),
    "seq_len": (1, 2**15),
    "ranks": (1, 2**16),  # each is asked for its share
    "global_size": (1, 2**20),  # located and sorted at once
    "steps": (1, 2**32),
    "first_sample": (0, LIMIT - 1),
    "seed": (0, 2**63 - 1),
}


@dataclass(frozen=True)
class SimulateOptions:
    """What a user asks for; None leaves it to the config, or to what is usual.

    Attributes:
        tokens, shards, vocabulary_size: of a data set on paper.
        global_size: sequences a step.
        first_sample: where the simulated steps start.
    """

    tokens: int | None = None
    shards: int | None = None
    vocabulary_size: int | None = None
    seq_len: int | None = None
    ranks: int | None = None
    global_size: int | None = None
    steps: int | None = None
    first_sample: int = 0
    seed: int | None = None


@dataclass(frozen=True)
class SimulatedSource:
    """A data set as its manifest describes it.

    Attributes:
        shard_tokens: int64 [shards]; where parts are in quarantine, what is left between them.
        token_bytes: bytes a token.
    """

    name: str
    shard_tokens: NDArray[np.int64]
    token_bytes: int

    @property
    def tokens(self) -> int:
        return int(self.shard_tokens.sum())


@dataclass(frozen=True)
class SimulatedPlan:
    """Data, and a run over it.

    Attributes:
        data: what decides the order; its sources are those of `sources`, in the same order.
        global_size: sequences a step, after the steps of `earlier`; divides by `ranks`.
        steps: how many are simulated, from `first_sample` on.
        total_steps: the length of the run, for its epochs.
        earlier: steps of other sizes.
        view: seq_len → which tokens a block is.
    """

    data: DataConfig
    sources: tuple[SimulatedSource, ...]
    seed: int
    ranks: int
    global_size: int
    steps: int
    total_steps: int
    first_sample: int
    earlier: tuple[Stretch, ...] = ()
    view: Callable[[int], View] = framed_view

    def __post_init__(self) -> None:
        if self.global_size % self.ranks:
            below, above = self.global_size // self.ranks * self.ranks, -(-self.global_size // self.ranks) * self.ranks
            raise UserError(
                f"A global batch of {self.global_size:,} does not divide over {self.ranks:,} ranks.",
                where=f"global batch {self.global_size}, ranks {self.ranks}",
                remedy=f"Take {' or '.join(f'{size:,}' for size in (below, above) if size)} sequences.",
            )

    @property
    def phases(self) -> Phases:
        return lay_out(self.data, BatchConfig(global_size=self.global_size))

    @property
    def batch(self) -> BatchPlan:
        """The steps of the run, each rank's sequences in one micro-batch."""
        sizes = (self.global_size, self.global_size // self.ranks, self.ranks, 1, self.data.seq_len, self.total_steps)
        return BatchPlan(*sizes, self.earlier, len(self.data.phases))

    def payload(self, phase: int) -> int:
        """Count the content tokens a block."""
        return self.view(self.phases[phase].seq_len).payload

    def blocks(self, phase: int) -> tuple[int, ...]:
        """Count the whole blocks of each source."""
        return tuple(self.view(self.phases[phase].seq_len).block_count(source.tokens) for source in self.sources)

    @property
    def end_sample(self) -> int:
        """Where the run ends, or the simulated steps, whichever is later."""
        return max(self.batch.end_sample, self.batch.end_of(self.first_sample, self.steps))

    def order(self) -> RunOrder:
        blocks = [self.blocks(phase) for phase in range(len(self.phases))]
        return mixture_order(self.data, self.phases, blocks, [source.tokens for source in self.sources], self.seed)


def plan_simulation(source: str | None, overrides: Sequence[str], options: SimulateOptions) -> SimulatedPlan:
    """Make the plan of a config, of a prepared folder (of either only manifests are read), or on paper.

    Args:
        source: a config file, a recipe, a folder that `prepare` wrote, or None for data on paper.
        overrides: `key=value` of a config.

    Raises:
        UserError: for options that do not fit together or make no plan, and what `load_config` raises.
        DamagedError: for a manifest that cannot be read.
    """
    for name, (least, most) in _BOUNDS.items():
        value = getattr(options, name)
        if value is not None and not least <= value <= most:
            raise UserError(
                f"It must be at least {least} and at most {most:,}.",
                where=f"{_flag(name)} {value}",
                remedy="Give another number.",
            )
    if source is None:
        return _over(_paper_source(options), options)
    _refuse(options, ("tokens", "shards", "vocabulary_size"), "describes data on paper, but there is real data to read")
    if user_path(source).is_dir() and source not in recipe_names():
        if overrides:
            raise UserError(
                f"'{source}' is a data folder, and '{overrides[0]}' overrides a config.",
                where=overrides[0],
                remedy="Use the options instead (--seq-len, --global-batch), or give a config.",
            )
        return _over(_read_source(source), options)
    return _plan_of_config(source, overrides, options)


def _paper_source(options: SimulateOptions) -> SimulatedSource:
    """Make shards of nearly equal size, of which there is only a manifest, for a moment."""
    tokens, shards = options.tokens or PAPER_TOKENS, options.shards or PAPER_SHARDS
    if tokens < shards:
        raise UserError(
            f"{tokens:,} tokens cannot fill {shards:,} shards.",
            where=f"--tokens {tokens} --shards {shards}",
            remedy="Give fewer --shards.",
        )
    with tempfile.TemporaryDirectory() as folder:
        _write_paper_manifest(Path(folder), tokens, shards, options.vocabulary_size or PAPER_VOCABULARY)
        return replace(_read_source(folder), name="paper")


def _write_paper_manifest(folder: Path, tokens: int, shards: int, vocabulary_size: int) -> None:
    """Write a manifest like any other: reading it costs what it costs with real data. Its hashes are of nothing."""
    dtype = token_dtype(vocabulary_size)
    ends = [(number + 1) * tokens // shards for number in range(shards)]
    entries = []
    for number, (start, end) in enumerate(itertools.pairwise([0, *ends])):
        size = end - start
        sizes = {"tok": size * dtype.itemsize, "doc": 16, "sum": -(-size * dtype.itemsize // SUM_BYTES) * 8}
        files = {suffix: (count, _NO_HASH) for suffix, count in sizes.items()}
        entries.append(ShardEntry(f"shard-{number:05d}", size, 1, files))
    manifest = Manifest(dtype.str, "", vocabulary_size, 2, tokens, shards, tuple(entries))
    (folder / MANIFEST).write_text(manifest.to_json())


def _read_source(path: str, quarantine: Sequence[str] = ()) -> SimulatedSource:
    manifest = read_data_manifest(split_folder(path, "train"))
    # A quarantine leaves out whole MiB, so each stretch that is left begins at a page, as a shard does.
    lengths = [tokens for _, _, tokens in kept_stretches(manifest, quarantine, path)]
    return SimulatedSource(path, np.array(lengths, np.int64), np.dtype(manifest.dtype).itemsize)


def _over(source: SimulatedSource, options: SimulateOptions) -> SimulatedPlan:
    """Plan a run of the usual sizes over one source."""
    sizes = {} if options.seq_len is None else {"seq_len": options.seq_len}
    try:
        data = DataConfig.model_validate({"train": source.name, **sizes})
    except ValidationError as error:
        reason = error.errors()[0]["msg"].replace("Input should", "It should", 1)
        raise UserError(f"{reason}.", where=f"--seq-len {options.seq_len}", remedy="Give another --seq-len.") from None
    ranks, steps = options.ranks or MOST_RANKS, options.steps or USUAL_STEPS
    return SimulatedPlan(
        data=data,
        sources=(source,),
        seed=options.seed or 0,
        ranks=ranks,
        global_size=options.global_size or -(-USUAL_GLOBAL_SIZE // ranks) * ranks,
        steps=steps,
        total_steps=steps,
        first_sample=options.first_sample,
    )


def _plan_of_config(config_source: str, overrides: Sequence[str], options: SimulateOptions) -> SimulatedPlan:
    _refuse(options, ("seq_len", "global_size", "seed"), "stands in the config; override it there (see docs/config.md)")
    config = as_begun(load_config(config_source, overrides))
    batch, data = config.batch, config.data
    if data.samples != "stream":
        raise UserError(
            "A simulation lays out blocks of the stream, and these samples are whole documents.",
            where=f"data.samples={data.samples}",
            remedy="Set data.samples=stream to see the order at work, over another number of blocks.",
        )
    # As many ranks as one micro-batch each makes, which divides if any number does.
    micro_size = 1 if batch.micro_size == "auto" else batch.micro_size
    ranks = options.ranks or min(MOST_RANKS, max(1, batch.global_size // micro_size))
    sources = tuple(_read_source(source.path, source.quarantine) for source in data.train)
    phases = lay_out(data, batch)
    view = partial(view_of, config)
    epoch_blocks = [sum(view(phase.seq_len).block_count(source.tokens) for source in sources) for phase in phases]
    plan = plan_batch(batch, config.train, phases, ranks, epoch_blocks, find_defaults(config).whole_steps)
    return SimulatedPlan(
        data=data,
        sources=sources,
        seed=config.run.seed,
        ranks=ranks,
        global_size=batch.global_size,
        steps=options.steps or min(USUAL_STEPS, plan.total_steps),
        total_steps=plan.total_steps,
        first_sample=options.first_sample,
        earlier=plan.earlier,
        view=view,
    )


def _refuse(options: SimulateOptions, names: Sequence[str], why: str) -> None:
    for flag in [_flag(name) for name in names if getattr(options, name) is not None]:
        raise UserError(f"{flag} {why}.", where=flag, remedy=f"Leave {flag} out.")


def _flag(name: str) -> str:
    renamed = {"global_size": "--global-batch", "vocabulary_size": "--vocab-size"}
    return renamed.get(name, f"--{name.replace('_', '-')}")
