"""Which class of transformers a run trains: named nowhere else. A config carries its name, as `architectures`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import transformers
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_PRETRAINING_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from trainer.errors import UserError
from trainer.model.model_code import code_of

MASKED, PAIRED, CAUSAL, PERMUTED, DETECTING = "masked", "paired", "causal", "permuted", "detecting"
MAIN = ""
"""Of the models that a run trains, the one that bears its name."""
GENERATOR = "generator"
"""The one that proposes tokens to a model of the family DETECTING; it is of the family MASKED."""
REPLACED = "replaced"
"""What the one logit of a model of the family DETECTING is of."""
_ELECTRA = "ElectraForPreTraining"  # has a head for replaced tokens of its own, and no number of labels
# transformers gives these a causal class, and attention to both sides unless they are told otherwise.
_NOT_CAUSAL = {"bert-generation", "xlm", "xlnet"}


@dataclass(frozen=True)
class Family:
    """The classes with one kind of head.

    Attributes:
        auto_class: of transformers, which loads every one of them.
        kind: what such a model is, for messages.
        examples: model types, for messages.
        classes: model type → name of the class.
    """

    auto_class: str
    kind: str
    examples: str
    classes: Mapping[str, str]


def _only(names: Mapping[Any, Any], types: Collection[Any]) -> dict[str, str]:
    """Choose types of a table of transformers, in which a type may have several classes: the first is the usual one."""
    chosen = {model_type: names[model_type] for model_type in types}
    return {key: value if isinstance(value, str) else value[0] for key, value in chosen.items()}


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        MASKED: Family(
            "AutoModelForMaskedLM",
            "encoder with a masked-LM head",
            "roberta, bert or modernbert",
            _only(MODEL_FOR_MASKED_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES),
        ),
        PAIRED: Family(
            "AutoModelForPreTraining",
            "encoder with a head for pairs of sentences beside that for masked tokens",
            "bert, ernie, megatron-bert or albert",
            _only(MODEL_FOR_PRETRAINING_MAPPING_NAMES, ("albert", "bert", "ernie", "megatron-bert")),
        ),
        CAUSAL: Family(
            "AutoModelForCausalLM",
            "decoder with a causal language-model head",
            "gpt2, llama or opt",
            _only(
                MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
                MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - MODEL_FOR_MASKED_LM_MAPPING_NAMES.keys() - _NOT_CAUSAL,
            ),
        ),
        PERMUTED: Family(
            "AutoModelForCausalLM",
            "model of two streams, which predicts tokens in any order",
            "xlnet",
            _only(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, ("xlnet",)),
        ),
        DETECTING: Family(
            "AutoModelForTokenClassification",
            "encoder of which transformers has a class that tells something of each token",
            "electra, deberta-v2 or bert",
            {
                **_only(
                    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
                    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES.keys() & MODEL_FOR_MASKED_LM_MAPPING_NAMES.keys(),
                ),
                "electra": _ELECTRA,
            },
        ),
    }
)
"""By name, which an objective gives."""


def choose_class(config: PretrainedConfig, family: str) -> None:
    """Write into a config which class of the family is meant; its type, or its own code, has one."""
    code = code_of(config)
    name = FAMILIES[family].classes[config.model_type] if code is None else code.class_name(FAMILIES[family].auto_class)
    assert name is not None
    config.architectures = [name]
    if family == DETECTING and name != _ELECTRA:
        config.num_labels = 1
        config.id2label, config.label2id = {0: REPLACED}, {REPLACED: 0}


def check_pair_fields(config: PretrainedConfig, where: str) -> None:
    """Refuse a config whose model could not tell pairs: tokens are of two types, and a pair of two classes.

    Raises:
        UserError: naming the field.
    """
    for name, fits in (("type_vocab_size", config.type_vocab_size >= 2), ("num_labels", config.num_labels == 2)):
        if not fits:
            raise UserError(
                f"With objective.pair {name} must be 2, got {getattr(config, name)}.",
                where=where,
                remedy=f"Set model.overrides.{name}=2, or objective.pair=null.",
            )


def model_class(config: PretrainedConfig) -> Any:
    """Return the class that a config names: one that `choose_class` chose, or that a checkpoint has recorded.

    Raises:
        UserError: as `ModelCode.load`, for a class that is in a folder of its own.
    """
    code = code_of(config)
    return getattr(transformers, _name_of(config)) if code is None else code.load(auto_class_of(config))


def is_in(config: PretrainedConfig, family: str) -> bool:
    """Tell whether a config is of a type that the family has."""
    if code_of(config) is None:
        return config.model_type in FAMILIES[family].classes
    return family in (MASKED, CAUSAL) and auto_class_of(config) == FAMILIES[family].auto_class


def _name_of(config: PretrainedConfig) -> str:
    assert config.architectures is not None
    (name,) = config.architectures
    return name


def auto_class_of(config: PretrainedConfig) -> str:
    """Name what of transformers loads the class that a config names."""
    name, code = _name_of(config), code_of(config)
    if name == _ELECTRA:
        return "AutoModelForPreTraining"
    return next(
        family.auto_class
        for family in FAMILIES.values()
        if (name in family.classes.values() if code is None else name == code.class_name(family.auto_class))
    )


def is_detector(config: PretrainedConfig) -> bool:
    """Tell whether the class that a config names has one logit a token, which says whether it was replaced."""
    return _name_of(config) in FAMILIES[DETECTING].classes.values()


def wider_classes(config: PretrainedConfig) -> list[str]:
    """Name the classes that may have weights beside the one that a config names: of its type's pre-training, and bare.

    Such are BERT's pooler and its head for pairs beside the masked-LM class, and RoBERTa's pooler.
    """
    if code_of(config) is not None:
        return []
    found = [names.get(config.model_type) for names in (MODEL_FOR_PRETRAINING_MAPPING_NAMES, MODEL_MAPPING_NAMES)]
    return [name if isinstance(name, str) else name[0] for name in found if name is not None]


def attended_tokens(seq_len: int, family: str) -> float:
    """Count how many tokens a token attends to on average in a block, itself included: of a causal model half."""
    return (seq_len + 1) / 2 if family == CAUSAL else float(seq_len)
