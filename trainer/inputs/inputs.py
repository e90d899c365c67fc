"""What a run starts from: tokenizer, data, order and batch arithmetic, opened and checked.

Everything here can be checked on a login node, before a model is built: `maskwright validate` does that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config import CUDA_GRAPHS, Config, DataConfig, run_folder
from trainer.config.run_names import check_named_files, check_run_folder
from trainer.data.batch import Samples
from trainer.data.block_reader import BlockReader, block_count
from trainer.data.dataset import ShardSet
from trainer.data.documents import positions_in_documents
from trainer.data.manifest import TOKEN_MARKS, split_folder
from trainer.data.order.mixture import check_epochs, mixture_order
from trainer.data.order.run_order import RunOrder
from trainer.data.shard_reader import ReadSettings
from trainer.data.token_marks import check_marked
from trainer.data.tokenizer import Vocabulary, load_tokenizer, read_vocabulary
from trainer.data.tokenizer_files import loading_note
from trainer.engine.deepspeed_config import check_precision, compose, load_preset, zero_stage
from trainer.errors import UserError
from trainer.inputs.pairs import describe_pairs, refuse_single_block
from trainer.inputs.phases import lay_out_phases
from trainer.inputs.probe import describe_probe
from trainer.inputs.summary import describe_rows, summarize_run
from trainer.inputs.teacher import describe_teacher
from trainer.inputs.validation import refuse_small_validation
from trainer.model.classes import CAUSAL, attended_tokens
from trainer.model.source import open_tokenizer, source_note
from trainer.model.trained import rehearse_trained
from trainer.objectives.registry import family_of, make_samples
from trainer.runtime.paths import real_path
from trainer.schedule.batch_plan import BatchPlan, plan_batch
from trainer.schedule.mask_ratio import mask_ratios, recorded_ratio
from trainer.schedule.phases import Phases
from trainer.schedule.run_length import find_defaults, resolve

_COUNTED_BLOCKS = 1024  # for the mean length of what a token attends to


@dataclass(frozen=True)
class Inputs:
    """A checked run, without its model."""

    config: Config
    """With numbers in the place of all that follows from the length of the run."""
    plan: BatchPlan
    ds_config: dict[str, Any]
    tokenizer: Any
    vocabulary: Vocabulary
    sources: list[ShardSet]
    validation: ShardSet | None
    order: RunOrder
    objectives: tuple[Samples, ...]
    """Of each phase."""
    notes: tuple[str, ...]
    """Who teaches, what is probed; how the model to continue from, and the tokenizer, differ from their files."""

    @property
    def objective(self) -> Samples:
        """The last phase's, with which is evaluated."""
        return self.objectives[-1]

    @property
    def shape_count(self) -> int:
        """The most shapes of batches, in training and in evaluation, that a compiled model is given."""
        shares = len({share for _, share in mask_ratios(self.config.objective, self.config.data, self.order.phases)})
        most = max(objective.shape_count for objective in self.objectives)
        apart = most if self.config.eval.mask_ratio is not None else 0  # evaluations predict a share of their own
        return self.plan.shape_count * most * (shares if self.config.data.phases else 1) + apart

    @cached_property
    def attended_tokens(self) -> tuple[float, ...]:
        """How many tokens a token attends to on average in each phase, itself included.

        All of its block or, with document attention, what the block holds of its document: a mean over the phase's
        first blocks.
        """
        if not self.config.model.document_attention:
            family = family_of(self.config)
            return tuple(attended_tokens(phase.seq_len, family) for phase in self.order.phases)
        return tuple(self._attended_in_documents(number) for number in range(len(self.order.phases)))

    def _attended_in_documents(self, phase: int) -> float:
        objective = self.objectives[phase]
        sources, blocks = self.order.orders[phase].locate(np.arange(_COUNTED_BLOCKS))
        attended, causal = 0, family_of(self.config) == CAUSAL
        for source in np.unique(sources).tolist():
            read = BlockReader(self.sources[source], objective).read_marks(blocks[sources == source])
            positions = positions_in_documents(objective.document_starts(read))
            # Over a document of n tokens that is n², or n · (n + 1) / 2.
            attended += int((positions + 1 if causal else 2 * positions + 1).sum())
        return attended / (_COUNTED_BLOCKS * objective.seq_len)

    def data_order(self, with_shards: bool = False) -> dict[str, Any]:
        """Say what decides which tokens sample t holds, for checkpoints and, with shards, for RUN/data_order.json."""
        sources = []
        for settings, source in zip(self.config.data.train, self.sources, strict=True):
            record = {
                "name": settings.label,
                "tokens": source.tokens,
                "documents": source.manifest.documents,
                "fingerprint": source.fingerprint,
                "quarantine": settings.quarantine,
            }
            if marks := _token_marks(self.objective):
                record["marks"] = {mark: source.manifest.mark_identity(mark) for mark in marks}
            if with_shards:
                record["shards"] = source.manifest.shard_identities()
            sources.append(record)
        described = self.order.describe()
        for phase, objective in zip(described["phases"], self.objectives, strict=True):
            phase["payload"] = objective.view.payload
        if self.objective.view.whole_documents:
            described["samples"] = "documents"
        ratio = recorded_ratio(self.config.objective, self.config.data, self.order.phases)
        return {**described, "mask_ratio": ratio, "sources": sources}

    def describe(self) -> list[str]:
        """Describe the run in a few lines."""
        available = None if self.validation is None else block_count(self.validation, self.objective)
        tokens = [source.tokens for source in self.sources]
        lines = summarize_run(self.config, self.plan, self.order, zero_stage(self.ds_config), tokens, available)
        if self.objective.view.whole_documents:
            lines += [describe_rows(self.sources, objective) for objective in self.objectives]
        elif self.config.model.document_attention:
            attended = " and then ".join(
                f"{attended:,.0f} of {phase.seq_len:,}"
                for attended, phase in zip(self.attended_tokens, self.order.phases, strict=True)
            )
            lines.append(f"attention: within documents; a token attends to {attended} on average")
        if self.config.objective.pair is not None:
            of_phases = zip(self.objectives, self.order.orders, strict=True)
            lines += [describe_pairs(self.config, self.sources, *of_phase) for of_phase in of_phases]
        return [*lines, *self.notes]


def open_inputs(
    config: Config,
    world_size: int,
    thorough: bool = True,
    folders: Mapping[str, Path] | None = None,
    micro_size: int | None = None,
) -> Inputs:
    """Open and check everything but the weights.

    Args:
        thorough: compare the size of every data file with its manifest, and rehearse the model; one rank does it for
            all, whose files and settings are the same.
        folders: where the data of a path in the config lie, when it is raw text that has been prepared.
        micro_size: what `batch.micro_size: auto` stands for; None where it is not known, and 1 stands for any.

    Raises:
        UserError: with the key, file or value, and the remedy.
        DamagedError: when a data file is missing or has another size than recorded.
    """
    base = _Base.of(config, micro_size, thorough)
    opener = _ShardOpener(
        config.data, base.vocabulary, base.tokenizer_folder, thorough, folders or {}, _token_marks(base.objectives[-1])
    )
    sources = [opener.open(source.path, "train", source.quarantine) for source in config.data.train]
    blocks = [[block_count(source, objective) for source in sources] for objective in base.objectives]
    config, order, plan = _arrange(config, world_size, base, [source.tokens for source in sources], blocks)
    if config.model.compile:
        _check_compile(config, base.preset)
    if config.model.compile == CUDA_GRAPHS:
        _check_cuda_graphs(config, base.preset, plan)
    return Inputs(
        config=config,
        plan=plan,
        ds_config=compose(config, base.preset, plan),
        tokenizer=base.tokenizer,
        vocabulary=base.vocabulary,
        sources=sources,
        validation=_open_validation(config, base.objectives[-1], opener),
        order=order,
        objectives=base.objectives,
        notes=base.notes,
    )


def check_without_data(config: Config) -> None:
    """Check what needs no data; raises as `open_inputs` does."""
    _Base.of(config)


def describe_unprepared(
    config: Config,
    world_size: int,
    folders: Mapping[str, Path],
    estimated_tokens: Mapping[str, int],
    micro_size: int | None = None,
    held_out_tokens: int | None = None,
) -> list[str]:
    """Say from estimates what `Inputs.describe` will say when some paths are raw text that is not prepared yet.

    Args:
        folders: as for `open_inputs`, of the paths that are prepared.
        estimated_tokens: of the other paths.
        micro_size: as for `open_inputs`.
        held_out_tokens: estimated, of validation data that are not prepared either.

    Raises:
        UserError: as `open_inputs`.
    """
    base = _Base.of(config, micro_size)
    opener = _ShardOpener(
        config.data, base.vocabulary, base.tokenizer_folder, True, folders, _token_marks(base.objectives[-1])
    )
    tokens = [
        estimated_tokens[source.path]
        if source.path in estimated_tokens
        else opener.open(source.path, "train", source.quarantine).tokens
        for source in config.data.train
    ]
    blocks = [[objective.view.block_count(count) for count in tokens] for objective in base.objectives]
    config, order, plan = _arrange(config, world_size, base, tokens, blocks)
    stage = zero_stage(compose(config, base.preset, plan))
    objective = base.objectives[-1]
    if held_out_tokens is None:
        validation = _open_validation(config, objective, opener)
        available = None if validation is None else block_count(validation, objective)
    else:
        available = objective.view.block_count(held_out_tokens)
        refuse_small_validation(config, objective, available, held_out_tokens)
    lines = summarize_run(config, plan, order, stage, tokens, available)
    if config.data.samples == "documents":
        lines.append("documents: until the text is prepared, their rows are counted as if they were all full")
    return [*lines, *base.notes]


@dataclass(frozen=True)
class _Base:
    """What a run is made of beside its data."""

    preset: dict[str, Any]
    tokenizer_folder: str
    tokenizer: Any
    vocabulary: Vocabulary
    phases: Phases
    objectives: tuple[Samples, ...]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, config: Config, micro_size: int | None = None, thorough: bool = True) -> _Base:
        check_run_folder(config)
        check_named_files(config, run_folder(config))
        preset = load_preset(config.deepspeed)
        check_precision(config, preset)
        folder, tokenizer = open_tokenizer(config)
        vocabulary = read_vocabulary(tokenizer, folder)
        phases = lay_out_phases(config, vocabulary, micro_size)
        checked = []
        if thorough:
            lengths = [config.data.seq_len, *(phase.seq_len for phase in phases)]
            rehearse_trained(config, vocabulary, lengths, family_of(config))
            checked = describe_teacher(config, vocabulary, lengths) + describe_probe(config, vocabulary, tokenizer)
        objectives = tuple(
            make_samples(config, vocabulary, phase.seq_len, phase=number) for number, phase in enumerate(phases)
        )
        notes = filter(None, (source_note(config.model), loading_note(folder), _tokenizer_note(config, tokenizer)))
        return cls(preset, folder, tokenizer, vocabulary, phases, objectives, (*checked, *notes))


def _arrange(
    config: Config, world_size: int, base: _Base, tokens: Sequence[int], blocks: Sequence[Sequence[int]]
) -> tuple[Config, RunOrder, BatchPlan]:
    """Make the resolved config, order and batch arithmetic over sources of so many tokens and, by phase, blocks."""
    order = mixture_order(config.data, base.phases, blocks, tokens, config.run.seed)
    for counts, objective in zip(blocks, base.objectives, strict=True):
        for source, count in zip(config.data.train, counts, strict=True):
            refuse_single_block(count, objective, f"source '{source.label}'", f"data.train={source.path}")
    epoch_blocks = [sum(counts) for counts in blocks]
    whole_steps = find_defaults(config).whole_steps
    plan = plan_batch(config.batch, config.train, base.phases, world_size, epoch_blocks, whole_steps)
    check_epochs(config.data, order, plan.end_sample)
    return resolve(config, plan), order, plan


def _check_compile(config: Config, preset: dict[str, Any]) -> None:
    """Refuse what cuts the model's graph at each module: slower than without, and past Dynamo's limit of graphs."""
    if zero_stage(preset) == 3:
        raise UserError(
            "torch.compile cannot see through ZeRO-3, which gathers the weights of each module when it is called: the "
            "model falls into a graph for each, and is slower than without.",
            where=f"model.compile={config.model.compile}, deepspeed={config.deepspeed}",
            remedy="Set model.compile=false, or deepspeed to zero1 or zero2.",
        )


def _check_cuda_graphs(config: Config, preset: dict[str, Any], plan: BatchPlan) -> None:
    """Refuse what moves weights between steps, and accumulation: a graph's gradients are overwritten by the next."""
    if preset["zero_optimization"].get("offload_optimizer"):
        raise UserError(
            "CUDA graphs need weights that stay where they are, which offload moves.",
            where=f"model.compile={CUDA_GRAPHS}, deepspeed={config.deepspeed}",
            remedy="Set model.compile=true, or deepspeed to zero1 or zero2.",
        )
    most = max(shape.accumulation for shape in (plan, *(stretch.shape for stretch in plan.earlier)))
    if most > 1:
        raise UserError(
            f"CUDA graphs are for steps of one micro-batch, and here steps accumulate {most}.",
            where=f"model.compile={CUDA_GRAPHS}, batch.global_size={plan.global_size}, "
            f"batch.micro_size={plan.micro_size}, ranks={plan.world_size}",
            remedy="Set model.compile=true, or batch.micro_size to batch.global_size / ranks.",
        )


def _token_marks(objective: Samples) -> tuple[str, ...]:
    """List the marks that an objective reads of what `prepare` wrote; documents have files of their own."""
    return tuple(mark for mark in TOKEN_MARKS if mark in objective.marks)


def _tokenizer_note(config: Config, tokenizer: Any) -> str:
    """Say how many tokens changed ids: each starts from the embedding of another one, which must not happen unseen."""
    model = config.model
    source = model.layers_from.model if model.layers_from is not None else model.from_pretrained
    if source is None or model.tokenizer in (None, source):
        return ""
    try:
        before, now = load_tokenizer(source).get_vocab(), tokenizer.get_vocab()
    except UserError:
        return (
            f"tokenizer: {source} has none of its own, so it is not checked that the ids are those it was trained with"
        )
    moved = sum(now.get(token) != number for token, number in before.items())
    return (
        f"tokenizer: {moved:,} of the checkpoint's {len(before):,} tokens have another id or are gone" if moved else ""
    )


def _open_validation(config: Config, objective: Samples, opener: _ShardOpener) -> ShardSet | None:
    path = config.data.validation_path
    if path is None or config.eval.every_steps is None:
        return None
    folder = real_path(opener.folder(path, "validation"))
    if folder in [real_path(opener.folder(source.path, "train")) for source in config.data.train]:
        raise UserError(
            "The validation data is the training data"
            + (", of which nothing is held out." if config.data.holds_out else "."),
            where=f"data.validation={config.data.validation}",
            remedy="Prepare with --validation-fraction 0.01 (raw text: data.text.validation_fraction), or leave "
            "data.validation out.",
        )
    validation = opener.open(path, "validation")
    refuse_small_validation(config, objective, block_count(validation, objective), validation.tokens)
    return validation


@dataclass(frozen=True)
class _ShardOpener:
    """Opens data sets and refuses those of another tokenizer."""

    settings: DataConfig
    vocabulary: Vocabulary
    tokenizer_folder: str
    check_sizes: bool
    folders: Mapping[str, Path]
    marks: tuple[str, ...]

    def folder(self, path: str, split: str) -> Path:
        return split_folder(self.folders.get(path, path), split)

    def open(self, path: str, split: str, quarantine: Sequence[str] = ()) -> ShardSet:
        folder = self.folder(path, split)
        reading = ReadSettings(self.settings.read, self.settings.verify_reads)
        shards = ShardSet(folder, quarantine, reading, self.check_sizes, self.vocabulary.size)
        manifest = shards.manifest
        if manifest.tokenizer_sha256 != self.vocabulary.sha256:
            raise UserError(
                f"The data was prepared with another tokenizer ({manifest.vocabulary_size:,} tokens, sha256 "
                f"{manifest.tokenizer_sha256[:12]}…) than the model uses ({self.vocabulary.size:,} tokens, sha256 "
                f"{self.vocabulary.sha256[:12]}…).",
                where=f"data {folder}, tokenizer {self.tokenizer_folder}",
                remedy=f"Set model.tokenizer to the data's own ({_tokenizer_of(folder)}), or prepare the data again.",
            )
        for mark in self.marks:
            check_marked(folder, manifest, mark)
        return shards


def _tokenizer_of(folder: Path) -> Path:
    """Find the copy that `prepare` left in a data set, or above it where it wrote two splits."""
    return inside if (inside := folder / "tokenizer").is_dir() else folder.parent / "tokenizer"


def sha256_of(value: Any) -> str:
    """Compute the sha256 of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
