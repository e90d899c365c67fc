"""What a run starts from: tokenizer, data, order and batch arithmetic, opened and checked.

Everything here can be checked on a login node, before a model is built: `maskwright validate` does that.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.batch_plan import BatchPlan, plan_batch
from trainer.config import Config
from trainer.data.order import SampleOrder
from trainer.data.shard_set import ShardSet
from trainer.data.shards import split_folder
from trainer.data.vocabulary import Vocabulary, load_tokenizer, vocabulary_of
from trainer.deepspeed_config import check_precision, compose, load_preset, stage_of
from trainer.errors import UserError
from trainer.model.build import build_config
from trainer.objectives.mlm import MaskedLanguageModelling


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

    def data_order(self) -> dict[str, Any]:
        """What decides which tokens sample t holds; frozen in RUN/data_order.json, and hashed into checkpoints."""
        return {
            **self.order.describe(),
            "payload": self.objective.payload,
            "fingerprints": [source.manifest.fingerprint for source in self.sources],
        }

    def describe(self) -> list[str]:
        """The run in a few lines."""
        plan, config = self.plan, self.config
        tokens = sum(source.tokens for source in self.sources)
        epochs = plan.total_steps * plan.global_size / self.epoch_blocks
        lines = [
            f"data: {tokens:,} tokens in {self.epoch_blocks:,} blocks of {plan.seq_len}; {epochs:.2f} epochs",
            f"batch: {plan.describe()}",
            f"deepspeed: {config.deepspeed} (stage {stage_of(self.ds_config)}), {config.train.precision}",
        ]
        if self.validation is not None:
            available = self.validation.block_count(self.objective.payload)
            lines.append(f"validation: {min(config.eval.samples, available):,} of {available:,} blocks")
        if config.schedule.warmup_steps > plan.total_steps:
            lines.append(
                f"schedule: the run ends within the warm-up of {config.schedule.warmup_steps:,} steps, before the rate "
                "reaches its peak"
            )
        return [*lines, self.tokenizer_note] if self.tokenizer_note else lines


def open_inputs(config: Config, world_size: int) -> Inputs:
    """Open and check everything but the weights.

    Raises:
        UserError: with the key, file or value, and the remedy.
        DamagedError: when a data file is missing or has another size than recorded.
    """
    _check_run_folder(config)
    preset = load_preset(config.deepspeed)
    check_precision(config, preset)
    tokenizer_folder = config.model.tokenizer or config.model.from_pretrained
    assert tokenizer_folder is not None
    tokenizer = load_tokenizer(tokenizer_folder, of_checkpoint=config.model.tokenizer is None)
    vocabulary = vocabulary_of(tokenizer, tokenizer_folder)
    build_config(config.model, vocabulary, config.data.seq_len)
    objective = MaskedLanguageModelling(config.objective, vocabulary, config.data.seq_len)
    sources = [_open_shards(source.path, "train", vocabulary, tokenizer_folder) for source in config.data.train]
    blocks = [source.block_count(objective.payload) for source in sources]
    order = SampleOrder(
        blocks,
        [source.weight for source in config.data.train],
        seed=config.run.seed,
        chunk_blocks=config.data.chunk_blocks,
        window_chunks=config.data.window_chunks,
    )
    plan = plan_batch(config.batch, config.train, config.data.seq_len, world_size, sum(blocks))
    return Inputs(
        config=config,
        plan=plan,
        ds_config=compose(config, preset, plan),
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        sources=sources,
        validation=_open_validation(config, objective, vocabulary, tokenizer_folder),
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


def _open_validation(
    config: Config, objective: MaskedLanguageModelling, vocabulary: Vocabulary, tokenizer_folder: str
) -> ShardSet | None:
    if config.data.validation is None or config.eval.every_steps is None:
        return None
    folder = split_folder(config.data.validation, "validation").resolve()
    if folder in [split_folder(source.path, "train").resolve() for source in config.data.train]:
        raise UserError(
            "The validation data is the training data.",
            where=f"data.validation={config.data.validation}",
            remedy="Prepare with --validation-fraction 0.01, or leave data.validation out.",
        )
    validation = _open_shards(config.data.validation, "validation", vocabulary, tokenizer_folder)
    if validation.block_count(objective.payload) == 0:
        raise UserError(
            f"The validation data has {validation.tokens:,} tokens: not one block of {config.data.seq_len}.",
            where=f"data.validation={config.data.validation}",
            remedy="Hold out more, set a smaller data.seq_len, or leave data.validation out.",
        )
    return validation


def _open_shards(path: str, split: str, vocabulary: Vocabulary, tokenizer_folder: str) -> ShardSet:
    folder = split_folder(path, split)
    shards = ShardSet(folder)
    manifest = shards.manifest
    if manifest.tokenizer_sha256 != vocabulary.sha256:
        raise UserError(
            f"The data was prepared with another tokenizer ({manifest.vocabulary_size:,} tokens, sha256 "
            f"{manifest.tokenizer_sha256[:12]}…) than the model uses ({vocabulary.size:,} tokens, sha256 "
            f"{vocabulary.sha256[:12]}…).",
            where=f"data {folder}, tokenizer {tokenizer_folder}",
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


def _check_run_folder(config: Config) -> None:
    """Raise UserError when the run folder is a file, or lies in one."""
    folder = run_folder(config).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise UserError(
            f"The run folder cannot be made: '{existing}' is a file.",
            where=f"run.dir={config.run.dir}",
            remedy="Give a run.dir that is, or can be made, a folder that you may write to.",
        )
