"""Objectives by their names in `objective.name`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trainer.config import Config
from trainer.data.batch import Samples
from trainer.data.blocks import View, framed_view
from trainer.data.tokenizer import Vocabulary
from trainer.errors import UserError, nearest
from trainer.objectives import clm, mlm, pairs, plm, rtd, teacher
from trainer.objectives.cross_entropy import CrossEntropies, cross_entropies
from trainer.objectives.language_model import LanguageModelLoss
from trainer.objectives.objective import Criterion, ObjectiveCard
from trainer.schedule.mask_ratio import Stages, evaluated_ratio, ratio_stages, stages_within
from trainer.schedule.phases import lay_out


@dataclass(frozen=True)
class Objective:
    """How the two halves of an objective are made, and what is said of it.

    Attributes:
        family: config → the kind of model that it trains, one of `trainer.model.classes.FAMILIES`.
        view: (config, seq_len) → which tokens a block is, as its samples have it.
        samples: (config, vocabulary, seq_len, shares that are masked) → what makes its batches.
        criterion: (config, what computes cross-entropies) → its loss.
        card: what a model card says of it.
    """

    family: Callable[[Config], str]
    view: Callable[[Config, int], View]
    samples: Callable[[Config, Vocabulary, int, Stages], Samples]
    criterion: Callable[[Config, CrossEntropies], Criterion]
    card: ObjectiveCard


def _ratios(config: Config, evaluating: bool, phase: int | None) -> Stages:
    if evaluating:
        return ((0, evaluated_ratio(config)),)
    phases = lay_out(config.data, config.batch)
    ratios = ratio_stages(config.objective, config.data, phases)
    return ratios if phase is None else stages_within(ratios, phases, phase)


def _masked_samples(config: Config, vocabulary: Vocabulary, seq_len: int, ratios: Stages) -> Samples:
    if (pair := config.objective.pair) is not None:
        return pairs.PairedSamples(config.objective, pair, vocabulary, seq_len, ratios)
    kind = rtd.ReplacedSamples if config.objective.name == "rtd" else mlm.MaskedSamples
    return kind(
        config.objective,
        vocabulary,
        seq_len,
        document_attention=config.model.document_attention,
        whole_documents=_whole_documents(config),
        ratios=ratios,
    )


def _masked_view(config: Config, seq_len: int) -> View:
    pair = config.objective.pair
    return framed_view(seq_len, _whole_documents(config)) if pair is None else pairs.view_of(pair, seq_len)


def _masked_criterion(config: Config, kernel: CrossEntropies) -> Criterion:
    pair = config.objective.pair
    return LanguageModelLoss(mlm.TERM, kernel) if pair is None else pairs.PairLoss(pair, kernel)


def _causal_samples(config: Config, vocabulary: Vocabulary, seq_len: int, ratios: Stages) -> Samples:
    return clm.CausalSamples(vocabulary, seq_len, config.model.document_attention, _whole_documents(config))


def _permuted_samples(config: Config, vocabulary: Vocabulary, seq_len: int, ratios: Stages) -> Samples:
    return plm.PermutedSamples(config.objective, vocabulary, seq_len, ratios)


def _replaced_criterion(config: Config, kernel: CrossEntropies) -> Criterion:
    assert config.objective.generator is not None, "the section fills it in"
    return rtd.ReplacedLoss(config.objective.generator, kernel)


def _whole_documents(config: Config) -> bool:
    return config.data.samples == "documents"


OBJECTIVES: dict[str, Objective] = {
    "mlm": Objective(
        family=lambda config: "masked" if config.objective.pair is None else "paired",
        view=_masked_view,
        samples=_masked_samples,
        criterion=_masked_criterion,
        card=mlm.CARD,
    ),
    "clm": Objective(
        family=lambda config: "causal",
        view=lambda config, seq_len: clm.view_of(seq_len, _whole_documents(config)),
        samples=_causal_samples,
        criterion=lambda config, kernel: LanguageModelLoss(clm.TERM, kernel, clm.ACCURACY, ahead=1),
        card=clm.CARD,
    ),
    "plm": Objective(
        family=lambda config: "permuted",
        view=lambda config, seq_len: framed_view(seq_len),
        samples=_permuted_samples,
        criterion=lambda config, kernel: LanguageModelLoss(plm.TERM, kernel, plm.ACCURACY),
        card=plm.CARD,
    ),
    "rtd": Objective(
        family=lambda config: "detecting",
        view=_masked_view,
        samples=_masked_samples,
        criterion=_replaced_criterion,
        card=rtd.CARD,
    ),
}


def find_objective(name: str) -> Objective:
    """Look an objective up.

    Raises:
        UserError: when there is none of this name.
    """
    if name not in OBJECTIVES:
        raise UserError(
            f"There is no objective '{name}'.{nearest(name, OBJECTIVES)}",
            where=f"objective.name={name}",
            remedy=f"One of {', '.join(OBJECTIVES)}.",
        )
    return OBJECTIVES[name]


def card_of(settings: Mapping[str, Any], of_generator: bool = False) -> ObjectiveCard:
    """Return what a model card says of an objective with these settings, the section `objective` of a config.

    Args:
        of_generator: whether the model is the generator of `rtd`.

    Raises:
        UserError: as `find_objective`.
    """
    if of_generator:
        return rtd.GENERATOR_CARD
    card, pair, taught = find_objective(settings["name"]).card, settings.get("pair"), settings.get("teacher")
    if taught is not None:
        return teacher.taught_card(card, taught)
    return card if pair is None else pairs.card_of(card, pair["task"])


def family_of(config: Config) -> str:
    """Say which kind of model a run trains, by its name in `trainer.model.classes.FAMILIES`.

    Raises:
        UserError: as `find_objective`.
    """
    return find_objective(config.objective.name).family(config)


def view_of(config: Config, seq_len: int) -> View:
    """Say which tokens a block of `seq_len` is.

    Raises:
        UserError: as `find_objective`.
    """
    return find_objective(config.objective.name).view(config, seq_len)


def make_samples(
    config: Config, vocabulary: Vocabulary, seq_len: int, evaluating: bool = False, phase: int | None = None
) -> Samples:
    """Make what turns blocks into batches of `seq_len` tokens.

    Args:
        evaluating: whether for evaluations, whose batches do not depend on how far the run has come.
        phase: number of the one that the batches are of; None for batches with as many predictions as any has.

    Raises:
        UserError: as `find_objective`.
    """
    ratios = _ratios(config, evaluating, phase)
    samples = find_objective(config.objective.name).samples(config, vocabulary, seq_len, ratios)
    if (settings := config.objective.teacher) is None:
        return samples
    # A term of language has its objective's name.
    return teacher.TaughtSamples(samples, config.objective.name, settings)


def make_criterion(
    config: Config, kernel: CrossEntropies = cross_entropies, taught_by: teacher.Teacher | None = None
) -> Criterion:
    """Make the loss of a run.

    Args:
        kernel: what computes cross-entropies in training.
        taught_by: the teacher, where the config has one; None if only the terms of the loss are asked for.
    """
    criterion = find_objective(config.objective.name).criterion(config, kernel)
    if (settings := config.objective.teacher) is None:
        return criterion
    assert isinstance(criterion, LanguageModelLoss)
    return teacher.TaughtLoss(settings, criterion, taught_by)
