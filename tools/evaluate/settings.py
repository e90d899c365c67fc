"""By which blocks and masks models are evaluated: the same for all of them, so that their numbers can be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tools.evaluate.options import EvaluateOptions
from tools.evaluate.subject import Subject
from trainer.config import Config, EvalConfig, SourceConfig, TextConfig
from trainer.errors import UserError
from trainer.model.hf_config import keeps_documents
from trainer.schedule.mask_ratio import evaluated_ratio
from trainer.sizing.micro_batch import read_records

_USUAL_SEQ_LEN = 512
_USUAL_MICRO_SIZE = 8
_MASKS = ("scheme", "lengths", "replace_by", "replace_mask", "replace_random")


@dataclass(frozen=True)
class Settings:
    """What all models are evaluated by.

    Attributes:
        source: whose settings they are; empty for defaults.
        seq_len: tokens a block.
        blocks: what a block is, as `data.samples`.
        document_attention: of models that no run has trained.
        samples: blocks.
        micro_size: blocks a rank in one forward pass.
        masks: keys of the section `objective`.
    """

    source: str
    seq_len: int
    blocks: str
    document_attention: bool
    samples: int
    micro_size: int
    masks: Mapping[str, Any]


def choose_settings(subjects: Sequence[Subject], options: EvaluateOptions) -> Settings:
    """Choose those of the first run among the models, or defaults; what the command line says goes before."""
    first = next((subject for subject in subjects if subject.run is not None), None)
    config = first.config if first is not None else subjects[0].config
    masks = _masks_of(config)
    if options.mask_ratio is not None:
        masks["mask_ratio"] = options.mask_ratio
    if first is None:
        seq_len = min(_USUAL_SEQ_LEN, *(subject.most_tokens or _USUAL_SEQ_LEN for subject in subjects))
    else:
        seq_len = config.data.seq_len
    return Settings(
        source=first.name if first is not None else "",
        seq_len=options.seq_len or seq_len,
        blocks=config.data.samples,
        document_attention=config.model.document_attention,
        samples=options.samples or config.eval.samples,
        micro_size=options.micro_size or (_USUAL_MICRO_SIZE if first is None else _micro_size(first)),
        masks=masks,
    )


def _masks_of(config: Config) -> dict[str, Any]:
    """Return what decides the masks of an evaluation, as in training."""
    return {"mask_ratio": evaluated_ratio(config), **{name: getattr(config.objective, name) for name in _MASKS}}


def _micro_size(subject: Subject) -> int:
    config, size = subject.config, subject.config.batch.micro_size
    if size != "auto":
        return size
    own = config.model_copy(update={"run": config.run.model_copy(update={"dir": str(subject.run)})})
    records = read_records(own)
    return records[-1]["micro_size"] if records else _USUAL_MICRO_SIZE


def config_of(
    subject: Subject, settings: Settings, path: str, run_dir: str, text: TextConfig, held_out: bool
) -> tuple[Config, list[str]]:
    """Write the config by which a model is evaluated on a path of data, and lines for the user.

    A teacher is left out: what is asked for is the loss over the text, and other models have none.

    Args:
        run_dir: beside which raw text is prepared.
        text: how raw text is read.
        held_out: whether it is what `data.validation: auto` holds out of the path.

    Raises:
        UserError: for blocks that the model cannot compute.
    """
    own, notes = subject.config, []
    _check_length(subject, settings.seq_len)
    by_documents = settings.blocks == "documents"
    wanted = by_documents or (own.model.document_attention if subject.run else settings.document_attention)
    within_documents = wanted and keeps_documents(subject.model_config)
    if by_documents and not within_documents:
        raise UserError(
            f"{subject.name} cannot keep its attention within documents, and the blocks of {settings.source} are rows "
            "of whole documents.",
            where=f"MODEL {subject.name}",
            remedy=f"Evaluate it without {settings.source}.",
        )
    if wanted and not within_documents:
        notes.append(f"{subject.name}: its class attends to whole blocks, and not within documents")
    if subject.run is not None and settings.source != subject.name and _masks_of(own) != settings.masks:
        notes.append(f"{subject.name}: masked as {settings.source}, which differs from its own run")
    model = {"tokenizer": subject.tokenizer_folder, "document_attention": within_documents}
    data = {
        "train": [SourceConfig(path=path)],
        "validation": "auto" if held_out else path,
        "seq_len": settings.seq_len,
        "samples": settings.blocks,
        "phases": [],
        "stages": [],
        "text": text,
    }
    return own.model_copy(
        update={
            "run": own.run.model_copy(update={"dir": run_dir}),
            "model": own.model.model_copy(update=model),
            "data": own.data.model_copy(update=data),
            "objective": own.objective.model_copy(update={**settings.masks, "teacher": None}),
            "batch": own.batch.model_copy(update={"micro_size": settings.micro_size}),
            "eval": EvalConfig(every_steps=1, samples=settings.samples),
        }
    ), notes


def _check_length(subject: Subject, seq_len: int) -> None:
    most = subject.most_tokens
    if most is not None and seq_len > most:
        raise UserError(
            f"Blocks have {seq_len} tokens, and {subject.name} has positions for {most}.",
            where=f"--seq-len, MODEL {subject.name}",
            remedy=f"Add --seq-len {most}, or less.",
        )
