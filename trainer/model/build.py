"""From the model section of a config to a model with weights."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from trainer.config import ModelConfig
from trainer.errors import DamagedError, UserError
from trainer.model.account import account_for_keys
from trainer.model.classes import CAUSAL, DETECTING, MAIN, MASKED, PERMUTED, model_class
from trainer.model.frozen import describe_frozen, freeze
from trainer.model.hf_config import (
    attention_of,
    build_config,
    position_offset,
    position_table,
    vocabulary_rows,
)
from trainer.model.layers import copy_layers
from trainer.model.model_code import is_stock, unused_code
from trainer.model.prediction_head import head_module
from trainer.model.stock import first_not_finite, prove_convertible, untie_if_trained_apart
from trainer.runtime.paths import is_local, user_path

if TYPE_CHECKING:
    from trainer.data.tokenizer import Vocabulary

COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Of forward and backward, by `train.precision`."""


@dataclass(frozen=True)
class BuiltModel:
    """What is ready to be trained, and the stock models in it.

    Attributes:
        module: what DeepSpeed trains, fp32, on the CPU, in training mode. A single model is its own module.
        exports: the models that a conversion gives, each of a stock transformers class, by the name of their folder
            within the converted one; MAIN is that folder itself.
        document_attention: whether attention is to be kept within documents.
        notes: lines for the user: what differs from what they may expect.
        says_tied: `tie_word_embeddings` as a checkpoint's identity has it: of the config that the main model was built
            from, which the weights may have corrected.
        frozen: names of the parameters that `model.frozen` keeps as they are, in their order in the module.
    """

    module: nn.Module
    exports: Mapping[str, PreTrainedModel]
    document_attention: bool
    notes: tuple[str, ...]
    says_tied: bool | None = None
    frozen: tuple[str, ...] = ()

    @property
    def model(self) -> PreTrainedModel:
        """The main one of the exports."""
        return self.exports[MAIN]


def build_model(
    settings: ModelConfig, vocabulary: Vocabulary, seq_len: int, seed: int, family: str = MASKED
) -> BuiltModel:
    """Initialise a model, or load a checkpoint and grow its vocabulary to the tokenizer's.

    The weights depend on `settings`, `vocabulary` and `seed` alone, so every rank makes the same ones; the global
    random state is left as it was.

    Args:
        family: as for `build_config`.

    Raises:
        UserError: as `build_config` and `freeze`, when a checkpoint cannot be read or lacks weights of the encoder, and
            when what is trained could not be converted.
        DamagedError: when a checkpoint holds values that are not finite.
    """
    config = build_config(settings, vocabulary, seq_len, family)
    notes: list[str] = []
    attention = attention_of(config)
    with _seeded(seed):
        if settings.from_pretrained is None:
            model = model_class(config)._from_config(config, dtype=torch.float32, attn_implementation=attention)
            if settings.layers_from is not None:
                notes.extend(
                    copy_layers(model, settings.layers_from, partial(_source_of_layers, vocabulary, seed, family))
                )
        else:
            model = _load(settings.from_pretrained, config, attention, notes)
            _correct_ties(model, notes)
            _fit_vocabulary(model, vocabulary, notes)
            notes.extend(_follow_tokenizer(model.config, vocabulary, family))
    _learn_padding(model, vocabulary, notes)
    prove_convertible(model)
    _refuse_not_finite(model, settings.from_pretrained)
    frozen = freeze(model, settings.frozen)
    notes.extend(describe_frozen(model, frozen))
    if settings.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if not settings.code:
        notes.extend(unused_code(settings.config or settings.from_pretrained))
    name = type(model).__name__
    if attention != "sdpa":
        notes.append(f"attention: {name} has no sdpa attention; its {attention} attention is slower")
    if head_module(model) is None and family not in (PERMUTED, DETECTING):
        skipped = "hold a part of them at a time" if family == CAUSAL else "skip the unmasked ones"
        others = "only known classes" if is_stock(type(model)) else "classes with a `maskwright_head`"
        notes.append(f"head: {name} computes the logits of all positions; {others} {skipped}")
    grown = model.config.get_text_config().vocab_size != config.get_text_config().vocab_size
    # Earlier versions did not correct it, and tied again what grew.
    says_tied = getattr(model.config if grown else config, "tie_word_embeddings", None)
    if grown and not model.get_input_embeddings().weight.requires_grad:
        notes.append("frozen: the embedding, so that the rows of new tokens stay near the mean, where they start")
    return BuiltModel(model.train(), {MAIN: model}, settings.document_attention, tuple(notes), says_tied, frozen)


def _source_of_layers(
    vocabulary: Vocabulary, seed: int, family: str, settings: ModelConfig
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    built = build_model(settings, vocabulary, 1, seed, family)
    return built.model, built.notes


def constant_inputs(model: PreTrainedModel, seq_len: int, device: torch.device) -> dict[str, Any]:
    """Make the forward arguments that are the same for every packed block; make them once and pass them always.

    They save what a stock class does otherwise in each forward pass, a cumulative sum over the padding mask and a
    gather. Given one row, the class broadcasts it: each table is looked up, and its gradient scattered, once a
    batch and not once a block. A packed block has no padding, so no attention_mask is ever passed (it would cost a
    host synchronisation and the flash kernel). Rotary classes make their own positions, a single row as well; a
    class that is not known here, or has code of its own, gets nothing and does as always.

    Returns:
        position_ids (from the class's offset) and token_type_ids (zeros), int64 [1, seq_len], each if the class
        takes it. Of a causal class that no keys and values are to be kept.
    """
    inputs: dict[str, Any] = {"use_cache": False} if getattr(model.config, "use_cache", False) else {}
    is_known = is_stock(type(model)) and head_module(model) is not None
    if not is_known or position_table(model) is None:
        return inputs
    offset = position_offset(model)
    inputs |= {"position_ids": torch.arange(offset, offset + seq_len, device=device).unsqueeze(0)}
    inputs["token_type_ids"] = torch.zeros_like(inputs["position_ids"])
    if model.config.model_type == "megatron-bert":
        # Without one it makes a mask of ones, and waits for the device to see that it hides nothing. What it is given
        # it adds to the scores, and False adds 0 in any precision.
        inputs["attention_mask"] = torch.zeros(1, 1, 1, seq_len, dtype=torch.bool, device=device)
    accepted = inspect.signature(model.forward).parameters
    return {name: value for name, value in inputs.items() if name in accepted}


def fp32_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copy all floating-point buffers by name, to be done before a cast of the model.

    `model.bfloat16()` rounds buffers too. For rotary frequencies (ModernBERT, EuroBERT, ESM) that moves an angle at
    position 500 by up to half a radian; the classes compute with them in fp32, so keeping them costs nothing.
    """
    return {
        name: buffer.detach().clone()
        for name, buffer in model.named_buffers(remove_duplicate=False)
        if buffer.is_floating_point()
    }


def restore_fp32_buffers(model: nn.Module, saved: Mapping[str, torch.Tensor]) -> None:
    """Put the copies from `fp32_buffers` back, on the device where each buffer is now."""
    for name, value in saved.items():
        owner, _, leaf = name.rpartition(".")
        buffers = model.get_submodule(owner)._buffers
        current = buffers[leaf]
        buffers[leaf] = value.clone() if current is None else value.to(current.device, copy=True)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the generator of the CPU, where weights are drawn, and no other; it is put back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _load(source: str, config: PretrainedConfig, attention: str, notes: list[str]) -> PreTrainedModel:
    name = str(user_path(source, "model.from_pretrained")) if is_local(source) else source
    try:
        model, report = model_class(config).from_pretrained(
            name,
            config=config,
            dtype=torch.float32,
            attn_implementation=attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # which are accounted for below, by name
            trust_remote_code=False,
            weights_only=True,
        )
    except Exception as error:  # OSError, RuntimeError, SafetensorError, ...: whatever the file makes them say
        raise UserError(
            f"Cannot load weights from '{source}': {' '.join(str(error).split())}",
            where="model.from_pretrained",
            remedy="Give a folder as save_pretrained writes it, with config.json and whole weight files.",
        ) from error
    notes.extend(account_for_keys(model, source, report))
    _zero_biases(model, report["missing_keys"])
    return model


def _zero_biases(model: PreTrainedModel, missing: Collection[str]) -> None:
    """Set biases that a checkpoint lacks to zero, as a class does that begins afresh.

    Some are parameters of a head itself (FNet, data2vec), which transformers then leaves as the memory was.
    """
    for name, parameter in model.named_parameters():
        if name in missing and name.rpartition(".")[2] == "bias":
            parameter.data.zero_()


def _correct_ties(model: PreTrainedModel, notes: list[str]) -> None:
    apart = untie_if_trained_apart(model.config, [name for name, _ in model.named_parameters()])
    if apart:
        notes.append(
            f"ties: {' and '.join(apart)} differ in the checkpoint, though its config says that they are one; "
            "they are trained apart, and the config is corrected"
        )


def _refuse_not_finite(model: PreTrainedModel, source: str | None) -> None:
    name = first_not_finite(model)
    if name is not None and source is not None:
        raise DamagedError(
            f"'{source}' holds values that are not finite (NaN or infinity), in {name}.",
            where="model.from_pretrained",
            remedy="Give an earlier checkpoint of that model, or fetch it again.",
        )
    if name is not None:
        raise UserError(
            f"{type(model).__name__} starts with values that are not finite (NaN or infinity), in {name}.",
            where="model",
            remedy="Correct what its initial weights follow from in the config, such as initializer_range.",
        )


def _fit_vocabulary(model: PreTrainedModel, vocabulary: Vocabulary, notes: list[str]) -> None:
    """Give every token of the tokenizer a row; surplus rows of a padded checkpoint stay."""
    rows = vocabulary_rows(model)
    if vocabulary.size > rows:
        grow_vocabulary(model, vocabulary.size)
        notes.append(f"vocabulary: resized from {rows:,} to {vocabulary.size:,}; new rows start at the mean")
    elif vocabulary.size < rows:
        notes.append(f"vocabulary: the tokenizer has {vocabulary.size:,} tokens; the model keeps its {rows:,} rows")
    pad = getattr(model.config, "pad_token_id", None)
    if pad is not None and pad != vocabulary.pad_id:
        notes.append(f"padding: the tokenizer's id is {vocabulary.pad_id}; the model keeps its own, {pad}")


def _follow_tokenizer(config: PretrainedConfig, vocabulary: Vocabulary, family: str) -> list[str]:
    """Give a causal checkpoint's config the begin and end tokens of the tokenizer, with which generation ends.

    Returns:
        Lines for the user on what was changed.
    """
    notes = []
    for name, number in (("bos_token_id", vocabulary.begin_id), ("eos_token_id", vocabulary.end_id)):
        own = getattr(config, name, None)
        if family == CAUSAL and own is not None and number not in (own if isinstance(own, list) else [own]):
            setattr(config, name, number)
            notes.append(f"tokenizer: {name} is {number}, which the checkpoint had as {own}")
    return notes


def _learn_padding(model: PreTrainedModel, vocabulary: Vocabulary, notes: list[str]) -> None:
    """Let the row of the padding token have gradients where the data may hold that token.

    torch gives none to the row that a class calls its padding; it is meant for tokens that stand nowhere else.
    """
    table: Any = model.get_input_embeddings()
    row = getattr(table, "padding_idx", None)
    if row is None or (row == vocabulary.pad_id and not vocabulary.shared_pad):
        return
    table.padding_idx = None
    if vocabulary.shared_pad:
        notes.append(f"padding: token {row} has another role as well, so its row is trained as any other")


def grow_vocabulary(model: PreTrainedModel, size: int) -> None:
    """Append rows drawn closely around the mean of the old ones (nlp.stanford.edu/~johnhew/vocab-expansion.html).

    transformers grows the embedding and the decoder; a bias of tied weights it fills with zeros or, where it is not
    the decoder's own (ESM), forgets. Here every output bias gets the mean as well, so that a new token starts as an
    average one. On the meta device shapes alone change.

    Raises:
        UserError: when the class cannot grow.
    """
    decoder = model.get_output_embeddings()
    _refuse_other_decoder(model, decoder, size)
    old_biases = {name: bias.detach().clone() for name, bias in _output_biases(model, decoder)}
    if model.device.type == "meta":  # there is nothing to take a mean of
        for kind in ("embeddings_weights", "lm_head_weights", "lm_head_bias"):
            setattr(model, f"_init_added_{kind}_with_mean", lambda *_, **__: None)
    takes_mean = "mean_resizing" in inspect.signature(model.resize_token_embeddings).parameters
    try:
        model.resize_token_embeddings(size, **({"mean_resizing": True} if takes_mean else {}))
    except Exception as error:  # NotImplementedError, AttributeError, ...: each class has its own way
        raise _cannot_grow(model, size, f"{type(error).__name__}: {' '.join(str(error).split())}") from error
    for name, bias in _output_biases(model, model.get_output_embeddings()):
        old = old_biases[name]
        bias.data = torch.cat([old, old.mean().expand(size - len(old))])
    model.tie_weights()


def _refuse_other_decoder(model: PreTrainedModel, decoder: nn.Module | None, size: int) -> None:
    """Refuse a class that names another matrix its decoder, as DebertaV2 without `legacy`: that would be resized."""
    rows = len(weight) if isinstance(weight := getattr(decoder, "weight", None), torch.Tensor) else None
    if rows is not None and rows != vocabulary_rows(model):
        raise _cannot_grow(model, size, f"what it calls its output embeddings has {rows:,} rows")


def _cannot_grow(model: PreTrainedModel, size: int, why: str) -> UserError:
    return UserError(
        f"{type(model).__name__} cannot be given the rows for a vocabulary of {size:,} tokens, more than its "
        f"{vocabulary_rows(model):,} ({why}).",
        where="model.tokenizer",
        remedy="Use the checkpoint's own tokenizer, without further tokens, or train a model of another type.",
    )


def _output_biases(model: PreTrainedModel, decoder: nn.Module | None) -> list[tuple[str, nn.Parameter]]:
    """Find the biases [V] of the vocabulary projection: the decoder's own and its parent's, which may be one tensor."""
    if decoder is None:
        return []
    path = next(name for name, module in model.named_modules() if module is decoder)
    parent = path.rpartition(".")[0]
    candidates = {f"{path}.bias": decoder, f"{parent}.bias": model.get_submodule(parent)}
    owned = {name: getattr(module, "bias", None) for name, module in candidates.items()}
    return [(name, bias) for name, bias in owned.items() if isinstance(bias, nn.Parameter)]
