"""The section `data`: sources, stages of their weights, phases of block lengths, and raw text."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from trainer.config.base import (
    Line,
    Name,
    NonNegativeFloat,
    OpenFraction,
    PositiveFloat,
    PositiveInt,
    Section,
    Sequences,
)
from trainer.errors import nearest


class SourceConfig(Section):
    path: Line
    """A folder that `maskwright prepare` wrote; or raw text: a file, a folder or a glob, prepared on first use."""
    name: Name | None = None
    """What metrics and stages call it. Default: the last part of `path`."""
    weight: NonNegativeFloat | None = None
    """Share of this source in the mixture, relative to the other weights. Default: 1, or from `data.temperature`."""
    max_epochs: PositiveFloat | None = None
    """Refuse a run that passes over this source more often."""
    quarantine: list[str] = Field(default_factory=list)
    """Damaged parts to leave out: SHARD, SHARD:MIB or SHARD:MIB-MIB, as `maskwright data verify` names them."""

    @property
    def label(self) -> str:
        return self.name if self.name is not None else PurePath(self.path).name or self.path


class TextConfig(Section):
    format: Literal["auto", "text", "jsonl", "csv", "parquet", "arrow", "hub"] = "auto"
    """auto goes by the file names; with hub, paths are names of data sets on the Hugging Face hub, or
    NAME:CONFIG:SPLIT."""
    field: str = "text"
    """The column that holds the text (all formats but text); a.b is the field b within a."""
    delimiter: str | None = None
    """What separates the fields of csv: one character, or tab. Default: a comma, a tab in .tsv files."""
    documents: Literal["file", "paragraph", "line", "row"] | None = None
    """What a document is. Default: paragraph for text, row for the other formats, which line means there as well."""
    on_bad_document: Literal["stop", "skip"] = "stop"
    """What to do with a document that is not UTF-8, not JSON, without the field or not text, or a csv row with too many
    fields; skip counts it."""
    validation_fraction: Annotated[float, Field(ge=0.0, le=0.5)] | None = None
    """Share of the documents to hold out, by the hash of their text, of each path of raw text; set `data.validation` to
    auto, or to the same path as `data.train`, then. Default: none, or what `data.validation: auto` says."""
    special_in_text: Literal["ids", "text", "refuse"] | None = None
    """What a special token that stands in a text becomes: its id, but for begin, end, pad and mask, which stay text; or
    all stay text; or the document is refused. Default: ids; a run that has begun keeps the data that it began with."""
    word_starts: Line | None = None
    """What marks where words start, for objective.scheme: tokenizer, jieba, phrases:FILE or module:function, as
    `prepare --word-starts`. Default: tokenizer where the scheme needs it, else nothing."""
    sentence_starts: Line | None = None
    """What marks where sentences start, for objective.pair: rules or module:function, as `prepare --sentence-starts`.
    Default: rules where there are pairs, else nothing."""
    cache: Line | None = None
    """Folder for what has been prepared, on a file system that all nodes share. Default: text-cache beside run.dir."""


def _as_sources(value: Any) -> Any:
    return [{"path": value}] if isinstance(value, str) else value


class StageConfig(Section):
    from_tokens: PositiveInt
    """First position, counted as `tokens` in the metrics; rounded up to a whole block."""
    weights: dict[str, NonNegativeFloat]
    """Weight of each source by name from there on; a source that is left out has none."""


class PhaseConfig(Section):
    seq_len: Annotated[int, Field(ge=8, le=32768)]
    """Tokens a block until then; at most data.seq_len."""
    until_tokens: PositiveInt
    """Where the phase ends, counted as `tokens` in the metrics; rounded up to whole steps of its global batch."""
    micro_size: Sequences | None = None
    """Sequences a rank in one forward pass until then; shorter ones leave room for more. Default: batch.micro_size."""
    global_size: Sequences | None = None
    """Sequences an optimizer step until then. Default: batch.global_size."""
    mask_ratio: OpenFraction | None = None
    """Share of a block's content tokens that is predicted until then. Default: objective.mask_ratio, which then is one
    number, and no list of stages."""
    rope_theta: PositiveFloat | None = None
    """Base of the rotary position embeddings until then, of the global layers where the model has local ones as well
    (ModernBERT); for models whose config has it, such as ModernBERT, EuroBERT and ESM. Default: the model's own, with
    which the run ends (model.overrides)."""
    local_rope_theta: PositiveFloat | None = None
    """The same of the local layers, for models that have some. Default: the model's own."""
    lr_factor: PositiveFloat = 1.0
    """What the rate of the schedule is multiplied by until then."""
    weights: dict[str, NonNegativeFloat] | None = None
    """Weight of each source by name until then; a source that is left out has none. Default: those of data.train."""


class DataConfig(Section):
    train: Annotated[list[SourceConfig], BeforeValidator(_as_sources), Field(min_length=1)]
    """A folder that `maskwright prepare` wrote, or raw text, or a list of sources to mix."""
    validation: Line | None = None
    """Held-out data: a folder that `maskwright prepare` wrote, or raw text, such as a file of your own (`data.text`).
    auto: what is held out of the first source of `train`, the validation part of a prepared folder or some documents of
    raw text: a twentieth of it, at least 16 KiB where that is no more than a fifth, and at most 4 MiB. Default: no
    evaluation."""
    seq_len: Annotated[int, Field(ge=8, le=32768)] = 512
    """Tokens a block, with the two special tokens at its ends. Evaluations have it from the first phase on."""
    samples: Literal["stream", "documents"] = "stream"
    """What a block is. stream: a stretch of the text, full to the last token. documents: whole documents (a line, a
    dialogue, a task's text each), as many as fit, then padding, with attention kept within each; a longer one is cut
    into pieces. It needs what model.document_attention needs, and sets it. It belongs to a run: a resume cannot change
    it."""
    phases: list[PhaseConfig] = Field(default_factory=list)
    """Earlier phases of the run, each up to a given token. What a phase leaves out is as in the last one, which is what
    the config says elsewhere: blocks of seq_len, objective.mask_ratio, the weights of train, the model's own rope theta
    and the rate of the schedule. A phase cuts the same data anew, in an order of its own. A resume may change what lies
    ahead."""
    temperature: Annotated[float, Field(ge=0.1, le=1e6)] | None = None
    """Weigh sources by tokens^(1/temperature) (arXiv:1907.05019): 1 by size, larger towards equal shares."""
    stages: list[StageConfig] = Field(default_factory=list)
    """Later weights, each from a given token on. More may be added while a run goes on, for what lies ahead."""
    workers: Annotated[int, Field(ge=0, le=512)] = 2
    """Loader processes a rank; 0 loads in the training process."""
    chunk_blocks: PositiveInt = 1024
    """Blocks a chunk: what is read from one place (1,024 × 510 tokens × 2 bytes ≈ 1 MiB)."""
    window_chunks: PositiveInt = 1024
    """Chunks a window: blocks are shuffled globally within it (≈ 1 GiB)."""
    mixture_block: PositiveInt = 65_536
    """Samples over which a mixture holds its weights exactly (to a whole sample)."""
    read: Literal["mmap", "pread"] = "mmap"
    """How token files are read; pread where a parallel file system maps files badly."""
    text: TextConfig = TextConfig()
    """How raw text is read where it is given in the place of prepared data."""
    verify_reads: bool = True
    """Compare each MiB of the data with its sum when a process first reads from it; damage ends the run."""

    @property
    def holds_out(self) -> bool:
        """Whether the validation data are a part of the first source."""
        return self.validation == "auto"

    @property
    def validation_path(self) -> str | None:
        """Where the validation data lie, as `path` of a source; None without evaluation."""
        return self.train[0].path if self.holds_out else self.validation

    @model_validator(mode="after")
    def sources_fit(self) -> Self:
        labels = [source.label for source in self.train]
        twice = next((label for label in labels if labels.count(label) > 1), None)
        if twice is not None:
            raise ValueError(f"has two sources called '{twice}': give each a name of its own (data.train[].name)")
        if self.temperature is not None and any(source.weight is not None for source in self.train):
            raise ValueError("has both temperature and weights in train: leave one of them out")
        if self.temperature is None and not any(source.weight != 0 for source in self.train):
            raise ValueError("train needs at least one source with a weight above 0")
        return self

    @model_validator(mode="after")
    def phases_fit(self) -> Self:
        for before, phase in zip([None, *self.phases], self.phases, strict=False):
            if before is not None and phase.until_tokens <= before.until_tokens:
                raise ValueError(f"phases must ascend: until_tokens {phase.until_tokens} after {before.until_tokens}")
            if phase.seq_len > self.seq_len:
                raise ValueError(f"phases must not have longer blocks than seq_len {self.seq_len}, got {phase.seq_len}")
        return self

    @model_validator(mode="after")
    def weights_of_phases_fit(self) -> Self:
        if all(phase.weights is None for phase in self.phases):
            return self
        for name, is_set in (("stages", bool(self.stages)), ("temperature", self.temperature is not None)):
            if is_set:
                raise ValueError(f"has both {name} and weights in phases: leave one of them out")
        labels = [source.label for source in self.train]
        for number, phase in enumerate(self.phases):
            for name in phase.weights or {}:
                if name not in labels:
                    raise ValueError(
                        f"phases[{number}].weights name '{name}', which is no source.{nearest(name, labels)}"
                    )
            if phase.weights is not None and not any(phase.weights.values()):
                raise ValueError(f"phases[{number}].weights have none above 0")
        return self

    @model_validator(mode="after")
    def stages_fit(self) -> Self:
        labels = [source.label for source in self.train]
        for before, stage in zip([None, *self.stages], self.stages, strict=False):
            if before is not None and stage.from_tokens <= before.from_tokens:
                raise ValueError(f"stages must ascend: from_tokens {stage.from_tokens} after {before.from_tokens}")
            for name in stage.weights:
                if name not in labels:
                    raise ValueError(f"stages name '{name}', which is no source.{nearest(name, labels)}")
            if not any(stage.weights.values()):
                raise ValueError(f"the stage from token {stage.from_tokens} has no weight above 0")
        return self
