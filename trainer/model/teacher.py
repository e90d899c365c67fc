"""A trained model that teaches: a stock class in evaluation mode, on the device, beside the engine.

It has no gradients and no part in ZeRO, and nothing of it is in a checkpoint but the hash of its weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import xxhash
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from trainer.config import Config, ModelConfig, TeacherConfig
from trainer.data.batch import Documents
from trainer.data.tokenizer import load_tokenizer
from trainer.errors import UserError
from trainer.model.account import account_for_weights
from trainer.model.build import COMPUTE_DTYPES, build_model, fp32_buffers, restore_fp32_buffers
from trainer.model.forward import Forward
from trainer.model.hf_config import ATTENTION_DROPOUTS, build_config
from trainer.model.prediction_head import HEAD_MODULES, PROJECTIONS, head_module
from trainer.model.rehearsal import rehearse
from trainer.model.source import cards_for, open_tokenizer
from trainer.model.stock import stock_model
from trainer.model.weight_files import weight_shapes

if TYPE_CHECKING:
    from trainer.data.tokenizer import Vocabulary

KEY = "objective.teacher.model"
_OF = "The teacher"


class TeacherModel:
    """Runs a teacher; see `trainer.objectives.teacher.Teacher`.

    Of a known causal class the rows that it gives are what its last matrix is given, so that no more logits are in
    memory than are asked for at once; of others they are the logits.

    Args:
        model: in the precision and on the device of the training.

    Attributes:
        identity: xxh3 over its weights in fp32, by name; empty where they have no values.
    """

    def __init__(
        self, model: PreTrainedModel, device: torch.device, document_attention: bool, identity: str = ""
    ) -> None:
        for name in ATTENTION_DROPOUTS:  # is off; variable-length attention would not be used with it
            if getattr(model.config, name, None):
                setattr(model.config, name, 0.0)
        self.model, self.identity = model.eval().requires_grad_(False), identity
        self._forward = Forward(model, device, document_attention)
        self._project: Any = None
        if (name := PROJECTIONS.get(model.config.model_type)) is not None:
            last = model.get_submodule(name)
            assert isinstance(last, nn.Linear)
            self._project, last.forward = last.forward, lambda input: input

    @property
    def weight_bytes(self) -> int:
        """What its weights take."""
        return sum(weight.nbytes for weight in (*self.model.parameters(), *self.model.buffers()))

    @torch.no_grad()
    def __call__(
        self,
        inputs: Mapping[str, torch.Tensor],
        prediction_index: torch.Tensor | None,
        documents: Documents | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Run it on the inputs of a batch, which are the model's.

        Returns:
            [B, S, H], the states that its head is given, None where its head is not known; and the rows.
        """
        output = self._forward(inputs, prediction_index, documents, with_states=True)
        return output.states, output.logits

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """Make the logits [n, V] of some of its rows."""
        return rows if self._project is None else self._project(rows)


def teacher_config(config: Config, vocabulary: Vocabulary, family: str) -> PretrainedConfig:
    """Make and check the Hugging Face config of a run's teacher; no weights are read but their names and shapes.

    Raises:
        UserError: when the config is not that of a model of the family with all its weights, or the model cannot be
            learnt from: it has fewer rows than the tokenizer or, with cosine, states of another width.
    """
    teacher = config.objective.teacher
    assert teacher is not None
    with cards_for(KEY, _OF):
        found = build_config(_as_model(config), vocabulary, config.data.seq_len, family)
        _refuse_random_weights(found, teacher.model)
    rows = found.get_text_config().vocab_size
    if rows < vocabulary.size:
        raise UserError(
            f"The teacher has {rows:,} rows of tokens, and the tokenizer {vocabulary.size:,} tokens.",
            where=f"{KEY}={teacher.model}",
            remedy="Train with the teacher's own tokenizer: prepare the data with it, and set model.tokenizer to it.",
        )
    if teacher.cosine:
        _refuse_other_states(build_config(config.model, vocabulary, config.data.seq_len, family), found)
    return found


def check_teacher(config: Config, vocabulary: Vocabulary, seq_lens: Sequence[int], family: str) -> str:
    """Rehearse what a start does with a run's teacher; returns its class and size.

    Args:
        seq_lens: tokens a block: `data.seq_len`, and those of the phases.

    Raises:
        UserError: as `teacher_config`, and as `rehearse`.
    """
    found = teacher_config(config, vocabulary, family)
    with cards_for(KEY, _OF):
        rehearse(_as_model(config), vocabulary, seq_lens, family)
    model = stock_model(found, "meta")
    return f"{type(model).__name__}, {sum(weight.numel() for weight in model.parameters()):,} parameters"


def check_same_ids(config: Config) -> str | None:
    """Compare the run's tokenizer with the teacher's.

    Returns:
        A line for the user where the teacher has none; None where it has, and all is well.

    Raises:
        UserError: when a token has another id there, or none; and as `open_tokenizer`.
    """
    teacher = config.objective.teacher
    assert teacher is not None
    folder, tokenizer = open_tokenizer(config)
    try:
        theirs = load_tokenizer(teacher.model).get_vocab()
    except UserError:
        return (
            "teacher: it has no tokenizer of its own, so it is not checked that the ids are those it was trained with"
        )
    ours = tokenizer.get_vocab()
    other = [token for token, number in ours.items() if theirs.get(token) != number]
    if other:
        there = f"{theirs[other[0]]:,}" if other[0] in theirs else "none"
        raise UserError(
            f"The teacher has another tokenizer: {len(other):,} of {len(ours):,} tokens have another id there, such as "
            f"{other[0]!r}, which has {ours[other[0]]:,} here and {there} there.",
            where=f"{KEY}={teacher.model}, model.tokenizer={folder}",
            remedy="Prepare the data with the teacher's tokenizer, and set model.tokenizer to it; or choose a teacher "
            "that was trained with this one.",
        )
    return None


def load_teacher(config: Config, vocabulary: Vocabulary, family: str, device: torch.device) -> TeacherModel | None:
    """Load a run's teacher onto a device, in the training's precision; None for a run without one.

    Raises:
        UserError: as `teacher_config` and `build_model`.
        DamagedError: when its weights are not finite.
    """
    teacher = config.objective.teacher
    if teacher is None:
        return None
    found = teacher_config(config, vocabulary, family)
    with cards_for(KEY, _OF):
        model = build_model(_as_model(config), vocabulary, config.data.seq_len, seed=0, family=family).model
        _refuse_random_weights(found, teacher.model)  # of a name on the hub they are there now
    identity, buffers, module = _hash(model), fp32_buffers(model), cast(nn.Module, model)
    module.to(device=device, dtype=COMPUTE_DTYPES[config.train.precision])
    restore_fp32_buffers(model, buffers)
    return TeacherModel(model, device, config.model.document_attention, identity)


def _as_model(config: Config) -> ModelConfig:
    """Make the settings of a model that goes on from the teacher's weights."""
    teacher: TeacherConfig | None = config.objective.teacher
    assert teacher is not None
    return ModelConfig(from_pretrained=teacher.model, document_attention=config.model.document_attention)


def _refuse_random_weights(config: PretrainedConfig, source: str) -> None:
    account_for_weights(config, source, weight_shapes(source), whole=True)


def _refuse_other_states(student: PretrainedConfig, teacher: PretrainedConfig) -> None:
    """Refuse states that cannot be compared."""
    for config in (student, teacher):
        if head_module(stock_model(config, "meta")) is None:
            raise UserError(
                f"Where the last hidden states of '{config.model_type}' are is not known.",
                where="objective.teacher.cosine",
                remedy="Set objective.teacher.cosine=0, or take a model whose type is one of "
                f"{', '.join(HEAD_MODULES)}.",
            )
    if (ours := _state_width(student)) != (theirs := _state_width(teacher)):
        raise UserError(
            f"The teacher's hidden states have a width of {theirs:,} and the model's one of {ours:,}, so there is no "
            "cosine between them.",
            where="objective.teacher.cosine",
            remedy="Set objective.teacher.cosine=0, or train a model of the teacher's width.",
        )


def _state_width(config: PretrainedConfig) -> int:
    """Return the width of what the head is given; OPT may project its states to another one before."""
    return getattr(config, "word_embed_proj_dim", None) or config.hidden_size


def _hash(model: PreTrainedModel) -> str:
    """Hash the weights in fp32 by name, on the CPU, so that the same ones have the same hash wherever they lie."""
    digest = xxhash.xxh3_128()
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name} {list(weight.shape)}".encode())
        digest.update(weight.detach().contiguous().numpy().data)
    return digest.hexdigest()
