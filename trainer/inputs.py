"""What a run starts from: tokenizer, data, order and batch arithmetic, opened and checked.

Everything here can be checked on a login node, before a model is built: `maskwright validate` does that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from trainer.batch_plan import BatchPlan, plan_batch
from trainer.config import Config, DataConfig
from trainer.data.borders import DocumentBorders, positions_in_documents
from trainer.data.mixture import check_epochs, mixture_order
from trainer.data.open_shard import ReadSettings
from trainer.data.order import SampleOrder
from trainer.data.shard_set import ShardSet
from trainer.data.shards import split_folder
from trainer.data.vocabulary import Vocabulary, load_tokenizer, vocabulary_of
from trainer.deepspeed_config import check_precision, compose, load_preset, stage_of
from trainer.errors import UserError
from trainer.model.build import build_config
from trainer.objectives.mlm import MaskedLanguageModelling

_COUNTED_BLOCKS = 1024  # for the mean length of what a token attends to


@dataclass(frozen=True)
class Inputs:
    """A checked run, without its model."""

    config: Config
    plan: BatchPlan
    ds_config: dict[str, Any]
    tokenizer: Any
    vocabulary: Vocabulary
    sources: list[ShardSet]
    validation: ShardSet | None
    order: SampleOrder
    objective: MaskedLanguageModelling
    tokenizer_note: str
    """How the tokenizer differs from the one of the checkpoint to continue from; empty when it does not."""

    @property
    def epoch_blocks(self) -> int:
        """Blocks in one pass over all sources."""
        return sum(source.block_count(self.objective.payload) for source in self.sources)

    @property
    def prediction_ratio(self) -> float:
        """Predicted positions over all positions of a block."""
        return self.objective.predictions_per_block / self.plan.seq_len

    @cached_property
    def attended_tokens(self) -> float:
        """How many tokens a token attends to on average, itself included.

        All of its block or, with document attention, what the block holds of its document: a mean over the run's
        first blocks.
        """
        if not self.config.model.document_attention:
            return float(self.plan.seq_len)
        sources, blocks = self.order.locate(np.arange(_COUNTED_BLOCKS))
        attended = 0
        for source in np.unique(sources).tolist():
            borders = DocumentBorders(self.sources[source])
            starts = borders.document_starts(blocks[sources == source], self.objective.payload)
            positions = positions_in_documents(self.objective.frame_starts(starts))
            attended += int((2 * positions + 1).sum())  # over a document of n tokens that is n²
        return attended / (_COUNTED_BLOCKS * self.plan.seq_len)

    def data_order(self, with_shards: bool = False) -> dict[str, Any]:
        """What decides which tokens sample t holds, for checkpoints and, shards and all, for RUN/data_order.json."""
        described = self.order.describe()
        blocks = described.pop("blocks")
        sources = []
        for settings, source, count in zip(self.config.data.train, self.sources, blocks, strict=True):
            record = {
                "name": settings.label,
                "tokens": source.tokens,
                "documents": source.manifest.documents,
                "blocks": count,
                "fingerprint": source.fingerprint,
                "quarantine": settings.quarantine,
            }
            if with_shards:
                record["shards"] = source.manifest.shard_identities()
            sources.append(record)
        return {**described, "seq_len": self.plan.seq_len, "payload": self.objective.payload, "sources": sources}

    def describe(self) -> list[str]:
        """The run in a few lines."""
        plan, config = self.plan, self.config
        tokens = sum(source.tokens for source in self.sources)
        epochs = self.order.epochs(plan.total_steps * plan.global_size)
        only = f"; {epochs[0]:.2f} epochs" if len(epochs) == 1 else f" from {len(epochs)} sources"
        lines = [
            f"data: {tokens:,} tokens in {self.epoch_blocks:,} blocks of {plan.seq_len}{only}",
            *(self._describe_sources(epochs) if len(epochs) > 1 else []),
            f"batch: {plan.describe()}",
            f"deepspeed: {config.deepspeed} (stage {stage_of(self.ds_config)}), {config.train.precision}",
        ]
        if config.model.document_attention:
            lines.append(
                f"attention: within documents; a token attends to {self.attended_tokens:,.0f} of {plan.seq_len:,} on "
                "average"
            )
        if self.validation is not None:
            available = self.validation.block_count(self.objective.payload)
            lines.append(f"validation: {min(config.eval.samples, available):,} of {available:,} blocks")
        if config.schedule.warmup_steps > plan.total_steps:
            lines.append(
                f"schedule: the run ends within the warm-up of {config.schedule.warmup_steps:,} steps, before the rate "
                "reaches its peak"
            )
        return [*lines, self.tokenizer_note] if self.tokenizer_note else lines

    def _describe_sources(self, epochs: list[float]) -> list[str]:
        """Each source with its share of the samples at every stage, and how often the run passes over it."""
        lines = []
        for number, (source, passes) in enumerate(zip(self.config.data.train, epochs, strict=True)):
            shares = [
                f"{weights[number] / sum(weights):.2%}"
                + (f" from token {start * self.plan.seq_len:,} on" if start else "")
                for start, weights in self.order.stages
            ]
            lines.append(f"  {source.label}: {', '.join(shares)}; {passes:.2f} epochs")
        return lines


def open_inputs(config: Config, world_size: int, check_sizes: bool = True) -> Inputs:
    """Open and check everything but the weights.

    Args:
        check_sizes: compare the size of every data file with its manifest; one rank does it for all.

    Raises:
        UserError: with the key, file or value, and the remedy.
        DamagedError: when a data file is missing or has another size than recorded.
    """
    preset = load_preset(config.deepspeed)
    check_precision(config, preset)
    tokenizer_folder = config.model.tokenizer or config.model.from_pretrained
    assert tokenizer_folder is not None
    tokenizer = load_tokenizer(tokenizer_folder, of_checkpoint=config.model.tokenizer is None)
    vocabulary = vocabulary_of(tokenizer, tokenizer_folder)
    build_config(config.model, vocabulary, config.data.seq_len)
    objective = MaskedLanguageModelling(config.objective, vocabulary, config.data.seq_len)
    opener = _ShardOpener(config.data, vocabulary, tokenizer_folder, check_sizes)
    sources = [opener.open(source.path, "train", source.quarantine) for source in config.data.train]
    blocks = [source.block_count(objective.payload) for source in sources]
    order = mixture_order(config.data, blocks, [source.tokens for source in sources], config.run.seed)
    plan = plan_batch(config.batch, config.train, config.data.seq_len, world_size, sum(blocks))
    check_epochs(config.data, order, plan.total_steps * plan.global_size)
    return Inputs(
        config=config,
        plan=plan,
        ds_config=compose(config, preset, plan),
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        sources=sources,
        validation=_open_validation(config, objective, opener),
        order=order,
        objective=objective,
        tokenizer_note=_tokenizer_note(config, tokenizer),
    )


def _tokenizer_note(config: Config, tokenizer: Any) -> str:
    """A token whose id has changed starts from the embedding of another one; that must not happen unseen."""
    source = config.model.from_pretrained
    if source is None or config.model.tokenizer in (None, source):
        return ""
    try:
        before, now = load_tokenizer(source, of_checkpoint=True).get_vocab(), tokenizer.get_vocab()
    except UserError:
        return (
            f"tokenizer: {source} has none of its own, so it is not checked that the ids are those it was trained with"
        )
    moved = sum(now.get(token) != number for token, number in before.items())
    return (
        f"tokenizer: {moved:,} of the checkpoint's {len(before):,} tokens have another id or are gone" if moved else ""
    )


def _open_validation(config: Config, objective: MaskedLanguageModelling, opener: _ShardOpener) -> ShardSet | None:
    if config.data.validation is None or config.eval.every_steps is None:
        return None
    folder = split_folder(config.data.validation, "validation").resolve()
    if folder in [split_folder(source.path, "train").resolve() for source in config.data.train]:
        raise UserError(
            "The validation data is the training data.",
            where=f"data.validation={config.data.validation}",
            remedy="Prepare with --validation-fraction 0.01, or leave data.validation out.",
        )
    validation = opener.open(config.data.validation, "validation")
    if validation.block_count(objective.payload) == 0:
        raise UserError(
            f"The validation data has {validation.tokens:,} tokens: not one block of {config.data.seq_len}.",
            where=f"data.validation={config.data.validation}",
            remedy="Hold out more, set a smaller data.seq_len, or leave data.validation out.",
        )
    return validation


@dataclass(frozen=True)
class _ShardOpener:
    """Opens data sets and refuses those of another tokenizer."""

    settings: DataConfig
    vocabulary: Vocabulary
    tokenizer_folder: str
    check_sizes: bool

    def open(self, path: str, split: str, quarantine: Sequence[str] = ()) -> ShardSet:
        folder = split_folder(path, split)
        reading = ReadSettings(self.settings.read, self.settings.verify_reads)
        shards = ShardSet(folder, quarantine, reading, self.check_sizes)
        manifest = shards.manifest
        if manifest.tokenizer_sha256 != self.vocabulary.sha256:
            raise UserError(
                f"The data was prepared with another tokenizer ({manifest.vocabulary_size:,} tokens, sha256 "
                f"{manifest.tokenizer_sha256[:12]}…) than the model uses ({self.vocabulary.size:,} tokens, sha256 "
                f"{self.vocabulary.sha256[:12]}…).",
                where=f"data {folder}, tokenizer {self.tokenizer_folder}",
                remedy=f"Set model.tokenizer to the data's own ({_tokenizer_of(folder)}), or prepare the data again.",
            )
        return shards


def _tokenizer_of(folder: Path) -> Path:
    """The copy that `prepare` left in a data set, or above it where it wrote two splits."""
    inside = folder / "tokenizer"
    return inside if inside.is_dir() else folder.parent / "tokenizer"


def sha256_of(value: Any) -> str:
    """sha256 of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def run_folder(config: Config) -> Path:
    return Path(config.run.dir).expanduser()
