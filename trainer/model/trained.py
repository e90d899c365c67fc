"""What a run trains, from its config: one model, or a generator beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from trainer.config import Config, GeneratorConfig, ModelConfig, RopeTheta
from trainer.errors import MaskwrightError, UserError
from trainer.model.build import BuiltModel, build_model
from trainer.model.classes import DETECTING, GENERATOR, MAIN, MASKED
from trainer.model.forward import Forward
from trainer.model.frozen import describe_frozen, freeze
from trainer.model.hf_config import build_config
from trainer.model.hidden_matrices import require_matrices
from trainer.model.rehearsal import rehearse
from trainer.model.replaced_tokens import GeneratorAndDiscriminator, ReplacingForward, share_embeddings
from trainer.model.rope_theta import check_theta, prove_theta

if TYPE_CHECKING:
    from trainer.data.tokenizer import Vocabulary


@dataclass(frozen=True)
class _Part:
    """One of the models, before it is built.

    Attributes:
        settings: where it comes from.
        vocabulary: the tokenizer's, with as many rows as all of the models are to have.
        family: of `trainer.model.classes.FAMILIES`.
        config: its own, `vocab_size` as it will be.
    """

    settings: ModelConfig
    vocabulary: Vocabulary
    family: str
    config: PretrainedConfig


def build_trained(config: Config, vocabulary: Vocabulary, family: str) -> BuiltModel:
    """Build what a run trains, the same on every rank.

    Args:
        family: of FAMILIES, that the objective trains.

    Raises:
        UserError, DamagedError: as `build_model`, for a generator that does not fit the model, and for Muon without
            matrices.
    """
    built = _build(config, vocabulary, family)
    if config.optimizer.name != "muon":
        return built
    return replace(built, notes=(*built.notes, require_matrices(built.module, built.exports)))


def _build(config: Config, vocabulary: Vocabulary, family: str) -> BuiltModel:
    if family != DETECTING:
        return build_model(config.model, vocabulary, config.data.seq_len, config.run.seed, family)
    built: dict[str, BuiltModel] = {}
    for name, part in _parts(config, vocabulary, family).items():
        seed = config.run.seed + (name == GENERATOR)  # else both would begin with the same numbers
        with _named(config, name):
            built[name] = build_model(part.settings, part.vocabulary, config.data.seq_len, seed, part.family)
    models = {name: each.model for name, each in built.items()}
    notes = [*built[MAIN].notes, *(f"generator: {note}" for note in built[GENERATOR].notes)]
    notes += _embeddings_note(config, models)
    module = put_together(config, models)
    assert isinstance(module, GeneratorAndDiscriminator)
    frozen = freeze(module, config.model.frozen)
    notes += describe_frozen(module, frozen)
    generator, model = (
        f"{type(each).__name__} of {sum(parameter.numel() for parameter in each.parameters()):,} parameters"
        for each in (module.generator, module.discriminator)
    )
    notes.append(f"generator: {generator}, for {model}; shared: {_generator(config).share}")
    documents, says_tied = config.model.document_attention, built[MAIN].says_tied
    return BuiltModel(module.train(), module.exports, documents, tuple(notes), says_tied, frozen)


def rehearse_trained(config: Config, vocabulary: Vocabulary, seq_lens: Sequence[int], family: str) -> None:
    """Do without storage what a start does with the models.

    Raises:
        UserError: as `rehearse`, for a generator that does not fit the model, and for Muon without matrices.
    """
    models, module = _rehearse(config, vocabulary, seq_lens, family)
    _prove_thetas(config, models)
    if config.optimizer.name == "muon":
        require_matrices(module, models_in(module))


def _rehearse(
    config: Config, vocabulary: Vocabulary, seq_lens: Sequence[int], family: str
) -> tuple[dict[str, PreTrainedModel], nn.Module]:
    """Rehearse each model by name; returns them, and what is trained."""
    if family != DETECTING:
        model = rehearse(config.model, vocabulary, seq_lens, family)
        return {MAIN: model}, model
    models = {}
    for name, part in _parts(config, vocabulary, family).items():
        with _named(config, name):
            models[name] = rehearse(part.settings, part.vocabulary, seq_lens, part.family)
    module = put_together(config, models)
    freeze(module, config.model.frozen)
    return models, module


def model_configs(config: Config, vocabulary: Vocabulary, family: str) -> dict[str, PretrainedConfig]:
    """Make the config of each model that a run trains, with the vocabulary that it will have.

    Raises:
        UserError: as `build_config`.
    """
    return {name: part.config for name, part in _parts(config, vocabulary, family).items()}


def find_theta(config: Config, vocabulary: Vocabulary, family: str) -> RopeTheta | None:
    """Find the theta with which a run ends, its models' own; None where no phase has another one.

    Raises:
        UserError: where phases cannot change it, or a generator has another one than the model.
    """
    if not _changes_theta(config):
        return None
    thetas = {name: check_theta(each, config.data) for name, each in model_configs(config, vocabulary, family).items()}
    if len(set(thetas.values())) > 1:
        raise UserError(
            f"The rope theta of the generator is {thetas[GENERATOR]}, and that of the model {thetas[MAIN]}; phases "
            "change both as one.",
            where="data.phases[].rope_theta, objective.generator.overrides",
            remedy="Give both the same theta, or leave it out of data.phases.",
        )
    return thetas[MAIN]


def _changes_theta(config: Config) -> bool:
    return any(
        value is not None for phase in config.data.phases for value in (phase.rope_theta, phase.local_rope_theta)
    )


def _prove_thetas(config: Config, models: Mapping[str, PreTrainedModel]) -> None:
    if _changes_theta(config):
        for model in models.values():
            prove_theta(model, config.data)


def put_together(config: Config, models: Mapping[str, PreTrainedModel]) -> nn.Module:
    """Make of the models of a run the module that DeepSpeed trains; it has them as `models_in` says.

    Raises:
        UserError: for a generator that does not fit the model.
    """
    if GENERATOR not in models:
        return models[MAIN]
    generator = _generator(config)
    return share_embeddings(models[GENERATOR], models[MAIN], generator.share, _trained_before(config))


def models_in(module: Any) -> dict[str, PreTrainedModel]:
    """List the stock models in what a run trains, by the names of `BuiltModel.exports`."""
    return module.exports if isinstance(module, GeneratorAndDiscriminator) else {MAIN: module}


def forward_of(module: Any, device: torch.device, document_attention: bool) -> Forward | ReplacingForward:
    """Make what runs the module, before it is wrapped, partitioned or compiled."""
    kind: Any = ReplacingForward if isinstance(module, GeneratorAndDiscriminator) else Forward
    return kind(module, device, document_attention)


def _trained_before(config: Config) -> list[str]:
    """List the models that begin with weights of others, their embeddings among them."""
    sources = {
        MAIN: config.model.from_pretrained or config.model.layers_from,
        GENERATOR: _generator(config).from_pretrained,
    }
    return [name for name, source in sources.items() if source is not None]


def _generator(config: Config) -> GeneratorConfig:
    generator = config.objective.generator
    assert generator is not None, "the section fills it in"
    return generator


def _parts(config: Config, vocabulary: Vocabulary, family: str) -> dict[str, _Part]:
    if family != DETECTING:
        return {MAIN: _part(config, config.model, vocabulary, family)}
    own = config.model.model_copy(update={"frozen": []})  # which is named by its place in both together
    found = {MAIN: _part(config, own, vocabulary, family)}
    settings = _generator_settings(config, own.model_copy(update={"layers_from": None}), found[MAIN].config)
    with _named(config, GENERATOR):
        found[GENERATOR] = _part(config, settings, vocabulary, MASKED)
    _refuse_other_type(config, found[MAIN].config, found[GENERATOR].config)
    # A token of the one is a token of the other: where a checkpoint has more rows than the tokenizer, both have them.
    rows = max(part.config.vocab_size for part in found.values())
    for part in found.values():
        part.config.vocab_size = rows
    return {name: replace(part, vocabulary=replace(vocabulary, size=rows)) for name, part in found.items()}


def _part(config: Config, settings: ModelConfig, vocabulary: Vocabulary, family: str) -> _Part:
    own = build_config(settings, vocabulary, config.data.seq_len, family)
    if settings.from_pretrained is not None:  # it grows to the tokenizer's, as build_model lets it
        own.vocab_size = max(own.vocab_size, vocabulary.size)
    return _Part(settings, vocabulary, family, own)


def _generator_settings(config: Config, settings: ModelConfig, model: PretrainedConfig) -> ModelConfig:
    """Write the generator as a section `model`: of the model's own source, but for its overrides, or of its own.

    Args:
        settings: the section of the model, whose config is `model`.
    """
    generator = _generator(config)
    if generator.from_pretrained is not None:
        source = {"preset": None, "config": None, "from_pretrained": generator.from_pretrained}
        return settings.model_copy(update={**source, "overrides": generator.overrides})
    source = {} if settings.from_pretrained is None else {"config": settings.from_pretrained, "from_pretrained": None}
    overrides = {**settings.overrides, **(generator.overrides or _usual_overrides(model))}
    return settings.model_copy(update={**source, "overrides": overrides})


def _usual_overrides(model: PretrainedConfig) -> dict[str, Any]:
    """Make a generator of a quarter to a half of the model: larger ones are found out less well (ELECTRA, figure 3)."""
    if model.model_type != "electra":  # where the width of embeddings that are shared is that of the layers
        return {"num_hidden_layers": max(1, model.num_hidden_layers // 2)}
    return {
        name: max(1, getattr(model, name) // 4) for name in ("hidden_size", "num_attention_heads", "intermediate_size")
    }


def _refuse_other_type(config: Config, model: PretrainedConfig, generator: PretrainedConfig) -> None:
    if model.model_type != generator.model_type:
        raise UserError(
            f"The generator is of type '{generator.model_type}', and the model of '{model.model_type}'.",
            where=f"objective.generator.from_pretrained={_generator(config).from_pretrained}",
            remedy="Give a generator of the model's type, or leave objective.generator.from_pretrained out.",
        )


def _embeddings_note(config: Config, models: Mapping[str, PreTrainedModel]) -> list[str]:
    """Say whose embeddings are given up, where two that were trained apart become one."""
    if _generator(config).share != "embeddings" or len(_trained_before(config)) < len(models):
        return []
    tables: list[Any] = [model.get_input_embeddings() for model in models.values()]
    one, other = (table.weight for table in tables)
    if one.shape == other.shape and torch.equal(one, other):
        return []
    return ["generator: its embeddings and the model's differ in the checkpoints; the generator's are shared"]


@contextmanager
def _named(config: Config, name: str) -> Iterator[None]:
    """Let errors of the generator name its own keys."""
    try:
        yield
    except MaskwrightError as error:
        if name == GENERATOR:
            own = _generator(config).from_pretrained is not None
            for field in ("where", "remedy"):
                text = getattr(error, field).replace("model.overrides", "objective.generator.overrides")
                if own:
                    text = text.replace("model.from_pretrained", "objective.generator.from_pretrained")
                setattr(error, field, text)
            error.problem = f"The generator: {error.problem}"
        raise
