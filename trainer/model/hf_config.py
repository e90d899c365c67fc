"""The Hugging Face config of a run, and every check that needs no weights.

A model is built once without storage (on torch's meta device), so that what its class refuses is refused here,
before data is read or a job is queued.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from trainer.config import ModelConfig
from trainer.errors import UserError, nearest
from trainer.model.architecture import Architecture, find_architecture
from trainer.model.classes import CAUSAL, FAMILIES, MASKED, PAIRED, check_pair_fields, choose_class, model_class
from trainer.model.model_code import code_of, is_stock, place_of
from trainer.model.two_streams import refuse_one_sided

if TYPE_CHECKING:
    from trainer.data.tokenizer import Vocabulary

_TOKENIZER_DECIDES = "it follows from the tokenizer"
_OBJECTIVE_DECIDES = "it follows from objective.name"
_NOT_TO_OVERRIDE: Mapping[str, str] = {
    "vocab_size": _TOKENIZER_DECIDES,
    **{
        f"{token}_token_id": _TOKENIZER_DECIDES
        for token in ("pad", "bos", "eos", "cls", "sep", "mask", "decoder_start")
    },
    "model_type": "give another model.preset or model.config",
    "dtype": "give train.precision",
    "torch_dtype": "give train.precision",
    "is_decoder": _OBJECTIVE_DECIDES,
    "is_encoder_decoder": _OBJECTIVE_DECIDES,
    "add_cross_attention": _OBJECTIVE_DECIDES,
    "use_cache": "training never uses it",
    "sparse_prediction": "only masked positions are predicted anyway",
}
DOCUMENT_ATTENTION_MODELS: Mapping[str, str] = {
    "bert": "BERT",
    "camembert": "CamemBERT",
    "distilbert": "DistilBERT",
    "electra": "ELECTRA",
    "ernie": "ERNIE",
    "gpt2": "GPT-2",
    "gpt_neox": "GPT-NeoX",
    "llama": "Llama",
    "modernbert": "ModernBERT",
    "modernbert-decoder": "ModernBERT's decoder",
    "opt": "OPT",
    "qwen3": "Qwen3",
    "roberta": "RoBERTa",
    "xlm-roberta": "XLM-RoBERTa",
}
"""`config.model_type` → name, of the classes that `document_attention` can keep within documents."""
ATTENTION_DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")  # as classes call it
# Different values leave some or all weight shapes as they are, and still make another model of the same weights.
_SHAPE_FIELDS = ("num_attention_heads", "num_key_value_heads", "head_dim", "num_hidden_layers", "num_hidden_groups")
_MOST_LAYERS, _LARGEST_SIZE = 1024, 2**24  # beyond what anybody trains; without a cap a slip builds modules for hours
_SIZE_FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "embedding_size")


def build_config(settings: ModelConfig, vocabulary: Vocabulary, seq_len: int, family: str = MASKED) -> PretrainedConfig:
    """Make and check the Hugging Face config of a run; no weights are made or read.

    For `from_pretrained` it is the checkpoint's own, before a resize of its vocabulary.

    Args:
        family: of FAMILIES, that the objective trains.

    Raises:
        UserError: for an unknown preset, a file that is no config, an override that is unknown, of the wrong type
            or not to be made, sizes that do not fit each other, a type that has no class in the family, or without
            activation checkpointing or document attention where it is asked for, and a seq_len beyond the model's
            positions.
    """
    found = find_architecture(settings, family)
    where, fields = found.where, found.fields
    overrides = _checked_overrides(settings, found.config_class, fields)
    if settings.from_pretrained is None:
        fields = {**fields, **_token_fields(found, vocabulary, family)}
    config = _make_config(found, {**fields, **overrides}, settings, family)
    try:
        _check_sizes(config, where)
    except (TypeError, RuntimeError) as error:  # transformers has an error of its own for such fields
        raise UserError(
            f"'{config.model_type}' has sizes that differ from layer to layer: {str(error)[:120]}",
            where=where,
            remedy=f"Train a model whose layers are alike, such as {FAMILIES[family].examples}.",
        ) from None
    refuse_one_sided(config, where)
    skeleton = _skeleton(config, vocabulary, where)
    if settings.from_pretrained is not None:
        _refuse_shape_changes(settings, found, overrides, vocabulary, family)
    if settings.activation_checkpointing and not skeleton.supports_gradient_checkpointing:
        raise UserError(
            f"{type(skeleton).__name__} does not support activation checkpointing.",
            where="model.activation_checkpointing",
            remedy="Set model.activation_checkpointing=false and, for less memory, a smaller batch.micro_size.",
        )
    if settings.document_attention and not keeps_documents(config):
        others = f"train one of {', '.join(DOCUMENT_ATTENTION_MODELS.values())}"
        declare = "set maskwright_documents = True in a class that takes an attention_mask [B, 1, S, S]"
        raise UserError(
            f"{type(skeleton).__name__} cannot keep its attention within documents.",
            where="model.document_attention",
            remedy="Set model.document_attention=false (and data.samples=stream), or "
            f"{others if found.code is None else declare}.",
        )
    _refuse_what_cannot_be_proven(config, where)
    _check_head(skeleton, where)
    if family == PAIRED:
        check_pair_fields(config, where)
    _check_seq_len(skeleton, seq_len, settings)
    return config


def keeps_documents(config: PretrainedConfig) -> bool:
    """Tell whether attention can be kept within documents; a class with code of its own says so itself."""
    if not is_stock(type(config)):
        return bool(getattr(model_class(config), "maskwright_documents", False))
    return config.model_type in DOCUMENT_ATTENTION_MODELS


def attention_of(config: PretrainedConfig) -> str:
    """Return 'sdpa' where the model class supports it, else 'eager'."""
    return "sdpa" if model_class(config)._supports_sdpa else "eager"


def heads_of(config: PretrainedConfig) -> int:
    """Count the attention's heads; 0 for a class without attention (FNet), or with another kind of it (Perceiver)."""
    return getattr(config, "num_attention_heads", None) or 0


def head_width_of(config: PretrainedConfig) -> int:
    """Compute the width of one head of the attention; 0 where there are none."""
    if not heads_of(config):
        return 0
    width = getattr(config, "true_hidden_size", None) or config.hidden_size  # MobileBERT's, within its bottlenecks
    return getattr(config, "head_dim", None) or width // heads_of(config)


def vocabulary_rows(model: PreTrainedModel) -> int:
    """Count the token table's rows; not every class has it in an nn.Embedding (I-BERT), or gives it out (Perceiver)."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    return len(weight) if isinstance(weight, torch.Tensor) else model.config.vocab_size


def attention_dropout_of(config: PretrainedConfig) -> float:
    """Read the dropout of the attention's probabilities."""
    return next((value for name in ATTENTION_DROPOUTS if (value := getattr(config, name, None))), 0.0)


def position_table(model: PreTrainedModel) -> nn.Embedding | None:
    """Find the table of learned or sinusoidal absolute positions; None for rotary and relative positions."""
    for name, module in model.base_model.named_modules():
        if name.rpartition(".")[2] == "position_embeddings" and isinstance(module, nn.Embedding):
            return module
    return None


def position_offset(model: PreTrainedModel) -> int:
    """Find the position id of the first token.

    Padding id + 1 in the RoBERTa family, whose position table has a row for padding
    (`create_position_ids_from_input_ids` in transformers, after fairseq); 0 elsewhere.
    """
    table = position_table(model)
    return 0 if table is None or table.padding_idx is None else table.padding_idx + 1


def _checked_overrides(
    settings: ModelConfig, config_class: type[PretrainedConfig], fields: Mapping[str, Any]
) -> dict[str, Any]:
    known = {name for name in (*vars(config_class()), *config_class.attribute_map, *fields) if not name.startswith("_")}
    known -= set(_NOT_TO_OVERRIDE)
    overrides = {}
    for name, value in settings.overrides.items():
        where = f"model.overrides.{name}"
        if name in _NOT_TO_OVERRIDE:
            raise UserError(
                f"'{name}' cannot be overridden: {_NOT_TO_OVERRIDE[name]}.", where=where, remedy=f"Remove {where}."
            )
        if name not in known:
            raise UserError(
                f"{config_class.__name__} has no field '{name}'.{nearest(name, sorted(known))}",
                where=where,
                remedy=f"Its fields are: {', '.join(sorted(known))}.",
            )
        overrides[config_class.attribute_map.get(name, name)] = value
    return overrides


def _token_fields(found: Architecture, vocabulary: Vocabulary, family: str) -> dict[str, int | None]:
    ids: dict[str, int | None] = {
        "vocab_size": vocabulary.size,
        "pad_token_id": vocabulary.pad_id,
        "bos_token_id": vocabulary.begin_id,
        "cls_token_id": vocabulary.begin_id,
        "eos_token_id": vocabulary.end_id,
        "sep_token_id": vocabulary.end_id,
        "mask_token_id": vocabulary.mask_id,
    }
    # A class with code of its own may take what its config.json has in any name.
    fields = {*vars(found.config_class()), *(found.fields if found.code is not None else ())}
    return {name: value for name, value in ids.items() if name in fields}


def _make_config(found: Architecture, fields: dict[str, Any], settings: ModelConfig, family: str) -> PretrainedConfig:
    try:
        config = found.config_class.from_dict(fields)
    except Exception as error:  # StrictDataclassError, ValueError, TypeError, KeyError: each class has its own checks
        message = " ".join(str(error).split())
        guilty = next((name for name in settings.overrides if f"'{name}'" in message), None)
        raise UserError(
            f"Not a {found.config_class.__name__}: {message}",
            where=f"model.overrides.{guilty}" if guilty else found.where,
            remedy="Correct the value.",
        ) from None
    if found.code is not None:
        config.auto_map = dict(found.code.auto_map)
    choose_class(config, family)
    for name in ("sparse_prediction", *(("use_cache",) if family != CAUSAL else ())):  # generation wants its cache
        if hasattr(config, name):
            setattr(config, name, False)
    return config


def _check_sizes(config: PretrainedConfig, where: str) -> None:
    for name in _SIZE_FIELDS:
        value = getattr(config, name, None)
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, got {value}.", where=where, remedy=_set_override(name))
    for name, value in config.to_dict().items():
        most = _MOST_LAYERS if "layers" in name else _LARGEST_SIZE
        if isinstance(value, int) and value > most:
            raise UserError(f"{name} must be at most {most:,}, got {value:,}.", where=where, remedy=_set_override(name))
    heads = heads_of(config)
    if not heads:
        return
    if getattr(config, "head_dim", None) is None and config.hidden_size % heads:
        raise UserError(
            f"hidden_size {config.hidden_size} is not divisible by num_attention_heads {heads}.",
            where="model.overrides.num_attention_heads",
            remedy="Set model.overrides.hidden_size to a multiple of model.overrides.num_attention_heads.",
        )
    key_value_heads = getattr(config, "num_key_value_heads", None) or heads
    if heads % key_value_heads:
        raise UserError(
            f"num_attention_heads {heads} is not divisible by num_key_value_heads {key_value_heads}.",
            where="model.overrides.num_key_value_heads",
            remedy=_set_override("num_key_value_heads"),
        )


def _set_override(name: str) -> str:
    return f"Correct model.overrides.{name}, or the field in the config."


def _skeleton(config: PretrainedConfig, vocabulary: Vocabulary, where: str) -> PreTrainedModel:
    """Build the model on the meta device: shapes and class, no storage."""
    kind = model_class(config)
    try:
        with torch.device("meta"):
            return kind._from_config(config, attn_implementation=attention_of(config))
    except Exception as error:  # a class checks its config as it likes: ValueError, AssertionError, KeyError, ...
        remedy = "Correct the model's config or model.overrides."
        positions = getattr(config, "max_position_embeddings", None)
        if isinstance(error, AssertionError) and positions is not None and (vocabulary.pad_id or 0) >= positions:
            remedy = (
                f"The padding token has id {vocabulary.pad_id}, and this class counts its {positions} positions from "
                "there: use a tokenizer whose special tokens come first."
            )
        own = place_of(error, code_of(config))
        raise UserError(
            f"{type(config).__name__} does not describe a model that can be built: {type(error).__name__}: {error}",
            where=f"{where}: {own}" if own else where,
            remedy=remedy,
        ) from None


def _refuse_shape_changes(
    settings: ModelConfig, found: Architecture, overrides: Mapping[str, Any], vocabulary: Vocabulary, family: str
) -> None:
    def shapes(change: Mapping[str, Any]) -> dict[str, Any]:
        config = _make_config(found, {**found.fields, **change}, settings, family)
        model = _skeleton(config, vocabulary, found.where)
        own = [getattr(config, name, None) for name in _SHAPE_FIELDS]
        return {"fields": own, **{name: tensor.shape for name, tensor in model.state_dict().items()}}

    if not overrides:
        return
    stored = shapes({})
    for name, value in overrides.items():
        if shapes({name: value}) != stored:
            raise UserError(
                f"Overriding '{name}' changes the shape of the checkpoint's weights, or how they are used.",
                where=f"model.overrides.{name}",
                remedy="Remove it, or train from random weights with model.preset or model.config.",
            )


def _refuse_what_cannot_be_proven(config: PretrainedConfig, where: str) -> None:
    """Refuse classes of which no conversion could show that what comes out is what was trained.

    Reformer's hashes are drawn anew in each pass. Funnel's row of padding is set to zero whenever transformers loads
    it: its `_init_weights` writes through a slice, which does not carry the mark that a weight has been loaded.
    """
    if config.model_type == "funnel":
        raise UserError(
            "transformers changes a weight of Funnel whenever it loads one (its row of padding), so a trained model "
            "could never be proven to be what was trained.",
            where=where,
            remedy="Train a model of another type.",
        )
    if "lsh" in getattr(config, "attn_layers", ()) and getattr(config, "hash_seed", None) is None:
        raise UserError(
            f"{type(config).__name__} hashes at random, so its logits are other ones each time, and a trained model "
            "could never be proven to be what was trained.",
            where="model.overrides.attn_layers",
            remedy="Give it local attention only (attn_layers of 'local'), or train a model of another type.",
        )


def _check_head(model: PreTrainedModel, where: str) -> None:
    head = getattr(model, "maskwright_head", None)
    if head is None or is_stock(type(model)) or head in dict(model.named_modules()):
        return
    raise UserError(
        f"{type(model).__name__} has no submodule '{head}', which its maskwright_head names.",
        where=where,
        remedy="Name the submodule that first receives the encoder's output, or leave maskwright_head out.",
    )


def most_tokens(model: PreTrainedModel) -> int | None:
    """Count the tokens that a model has positions for; None where nothing bounds them."""
    table = position_table(model)
    positions = getattr(model.config, "max_position_embeddings", None) if table is None else table.num_embeddings
    return positions - position_offset(model) if isinstance(positions, int) and positions >= 1 else None


def _check_seq_len(model: PreTrainedModel, seq_len: int, settings: ModelConfig) -> None:
    most, offset = most_tokens(model), position_offset(model)
    if most is None or seq_len <= most:
        return
    counted = f" (its position ids start at {offset})" if offset else ""
    can_grow = settings.from_pretrained is None or position_table(model) is None
    grow = f"Set model.overrides.max_position_embeddings={seq_len + offset}, or " if can_grow else "Set "
    raise UserError(
        f"data.seq_len {seq_len} needs {seq_len + offset} positions{counted}; the model has {most + offset}.",
        where="data.seq_len",
        remedy=f"{grow}data.seq_len to at most {most}.",
    )
