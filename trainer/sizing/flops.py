"""Floating-point operations of a training step, counted from the model's own layers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import takewhile

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.xlnet.modeling_xlnet import XLNetRelativeAttention
from transformers.pytorch_utils import Conv1D

from trainer.model.causal_attention import LOCAL, local_window
from trainer.model.classes import CAUSAL, is_detector, is_in
from trainer.model.hf_config import head_width_of, heads_of

_NOT_IN_A_STEP = ("contact_head",)  # part of some encoders, not computed in masked language modelling
_OF_POSITIONS = ("pos_key_proj", "pos_query_proj")  # DeBERTa's, once a batch
_POOLER, _PAIR_HEADS = "pooler", ("seq_relationship", "sop_classifier")  # for one token a block, and with each other


def flops_per_token(model: PreTrainedModel, attended_tokens: float, prediction_ratio: float) -> float:
    """Count training FLOPs a position of the input, forward and backward; an add and a multiply count as two.

    With H the width, I the intermediate size, L the layers, A the attended tokens, V the vocabulary and r the share
    of predicted positions this is, for RoBERTa and BERT,

        3 · [L · (8H² + 4HI) + 4·L·A·H + r · (2H² + 2HV)]

    that is: every matrix of a layer, the two products of attention, the head at the predicted positions, and twice
    the forward pass for the backward pass (arXiv:2001.08361, section 2.1, with the attention term kept). Other
    classes are counted by the same rule from their nn.Linear modules (GPT-2's Conv1D are such, transposed). What a
    block takes once is in `block_flops`. Elementwise work, norms, softmax, embedding look-ups and recomputation are not
    counted. With document attention only products within a document count, even where a block mask makes sdpa compute
    the others as well: they are no work of the model. For the same reason a layer with local attention (ModernBERT's)
    counts the tokens of its window, where those are fewer. Attention of another kind (Perceiver's) is not counted at
    all. Of experts those count that a token passes through.

    XLNet has a stream that sees tokens and one that predicts, and a matrix for positions, of which there are twice as
    many as tokens: 3 · [L · (12H² + 4HI) + 16·L·A·H + r · (L · (4H² + 4HI) + 2HV)]. Its class computes the attention of
    the stream that predicts at all positions, and so it is counted; the one-hot matrix by which it chooses some of
    them is not, as no look-up is. Weights may be on the meta device or partitioned: only their declared sizes are read.

    DeBERTa's queries and keys meet 2n relative positions too, which takes 4·L·2n·H more where both do. The vectors of
    positions pass through matrices once a batch, which is not counted.

    Frozen weights (`model.frozen`) have no gradient: of a matrix that is frozen two thirds remain, forward and the
    gradient of its input, and below the lowest weight that is trained, where no gradient arrives, one third. A trained
    matrix there takes two thirds. Which weights lie below is told by the order of the modules, so that key and value of
    the lowest layer count as if they stood on the query; of shared layers (ALBERT) each application counts as the last.
    Of a model without any gradient, such as a teacher, the forward pass alone counts.

    Args:
        attended_tokens: A, how many tokens a token attends to on average: the length of a block or, with document
            attention, `Inputs.attended_tokens`; of a causal model half of that.
        prediction_ratio: r, predicted positions over all positions; 1 for a head that computes every logit.
    """
    config = model.config
    encoder_matmuls, head_matmuls, _ = _matmul_flops(model)
    attention = 4 * _mean_over_layers(config, attended_tokens) * heads_of(config) * head_width_of(config)
    attention += _relative_positions(config)
    attention *= getattr(config, "num_hidden_layers", 0) * getattr(config, "inner_group_num", 1)
    attention *= _attention_share(model)
    if config.model_type == "xlnet":
        attention *= 4  # two streams, and scores of positions, of which there are two a token, beside those of contents
    if reach := getattr(config, "max_relative_position", 0):
        # NEZHA's queries meet a vector of each distance, and so do the probabilities that were summed up by it. These
        # vectors have no gradient: the backward pass takes as much as the forward pass, not twice that.
        distances = min(2 * reach + 1, 2 * attended_tokens - 1)
        attention += 4 * distances * config.hidden_size * config.num_hidden_layers * (1 + _is_trained(model)) / 3
    return 3.0 * (encoder_matmuls + attention + prediction_ratio * head_matmuls)


def head_flops(model: PreTrainedModel) -> float:
    """Count training FLOPs of the head at one predicted position; see `flops_per_token`."""
    return 3.0 * _matmul_flops(model)[1]


def block_flops(model: PreTrainedModel) -> float:
    """Count training FLOPs that a block takes once, whatever its length: 3 · (2H² + 4H) of pooler and head for pairs.

    Of a class without a head for pairs 0: its pooler, if it has one, leads to no loss.
    """
    return 3.0 * _matmul_flops(model)[2]


def step_flops(models: Mapping[str, PreTrainedModel], attended_tokens: float, seq_len: int) -> float:
    """Count training FLOPs a position of all that a run trains, but for heads over the vocabulary.

    Of a model that tells something of each token its head counts here.

    Args:
        models: as `BuiltModel.exports`.
    """
    return sum(
        flops_per_token(model, attended_tokens, float(is_detector(model.config))) + block_flops(model) / seq_len
        for model in models.values()
    )


def prediction_flops(models: Mapping[str, PreTrainedModel]) -> float:
    """Count training FLOPs of the heads over the vocabulary at one predicted position."""
    return sum(head_flops(model) for model in models.values() if not is_detector(model.config))


def _matmul_flops(model: PreTrainedModel) -> tuple[float, float, float]:
    """Count a third of the training FLOPs in matrices: those of the forward pass, where all weights are trained.

    Returns:
        Of a position in the encoder, of one in the head, and what a block takes once.
    """
    not_in_a_step = (*_NOT_IN_A_STEP, *_OF_POSITIONS)
    applications = _shared_layer_applications(model)
    encoder_matmuls = head_matmuls = pair_matmuls = 0.0
    has_pairs = any(name.rpartition(".")[2] in _PAIR_HEADS for name, _ in model.named_modules())
    encoder_modules = set(model.base_model.modules())
    active = getattr(model.config, "num_experts_per_tok", None)
    for name, module, share in _shares(model):
        if isinstance(module, XLNetRelativeAttention):  # its matrices are bare parameters
            matrix = 2 * module.d_model * module.n_head * module.d_head
            encoder_matmuls += 6 * matrix * share  # q, k, v, o, and r at two positions a token
            feed_forward = 4 * module.d_model * model.config.d_inner
            head_matmuls += (2 * matrix + feed_forward) * share  # q, o and both of the feed-forward
        elif active is not None:
            # The matrices of all experts of a layer are one bare parameter; a token passes through some of them.
            experts = [parameter for parameter in module.parameters(recurse=False) if parameter.ndim == 3]
            encoder_matmuls += sum(2 * each.numel() * active // len(each) for each in experts) * share
        if not isinstance(module, nn.Linear | Conv1D) or any(part in not_in_a_step for part in name.split(".")):
            continue
        flops = 2 * math.prod(_declared_shape(module)) * share
        if not {_POOLER, *_PAIR_HEADS}.isdisjoint(name.split(".")):
            pair_matmuls += flops * has_pairs
        elif module in encoder_modules:
            encoder_matmuls += flops * applications.get(name, 1)
        else:
            head_matmuls += flops
    return encoder_matmuls, head_matmuls, pair_matmuls


def _shares(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module, float]]:
    """Yield each module with its name and the share of three passes that its own matrices take.

    Those are the forward pass, the gradient of the input, if a weight below is trained, and that of the matrices.
    """
    arrives = all(parameter.requires_grad for parameter in model.parameters())  # then the embedding's is below all
    for name, module in _from_below(model):
        own = list(module.parameters(recurse=False))
        matrices = [parameter.requires_grad for parameter in own if parameter.ndim > 1]
        yield name, module, (1 + arrives + any(matrices)) / 3
        arrives = arrives or any(parameter.requires_grad for parameter in own)


def _is_trained(model: PreTrainedModel) -> bool:
    return any(parameter.requires_grad for parameter in model.parameters())


def _attention_share(model: PreTrainedModel) -> float:
    """Compute the share of the products of attention that is done: a third in a layer where no gradient arrives."""
    if not _is_trained(model):
        return 1 / 3
    count = getattr(model.config, "num_hidden_layers", None)
    lists = (module for module in model.base_model.modules() if isinstance(module, nn.ModuleList))
    layers = next((found for found in lists if len(found) == count), None)
    if not layers:  # ALBERT's, which are applied several times
        return 1.0
    inside = set(layers[0].modules())
    below = takewhile(lambda found: found[1] not in inside, _from_below(model))
    arrives = any(parameter.requires_grad for _, module in below for parameter in module.parameters(recurse=False))
    reached = 0
    for layer in layers:
        own = {name: parameter.requires_grad for name, parameter in layer.named_parameters()}
        reached += arrives or any(trained for name, trained in own.items() if "att" in name)
        arrives = arrives or any(own.values())
    return (len(layers) + 2 * reached) / (3 * len(layers))


def _from_below(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield modules in the order of a forward pass, which is that of their making; each after its parts."""
    for part, child in module.named_children():
        yield from _from_below(child, f"{name}.{part}" if name else part)
    yield name, module


def _mean_over_layers(config: PretrainedConfig, attended_tokens: float) -> float:
    """Compute how many tokens a token attends to in the mean of the layers, of which some may see a window alone."""
    try:
        window = local_window(config)
    except RuntimeError:  # transformers' of a class whose layers have windows of their own (NeoMME): counted as none
        window = None
    if window is None:
        return attended_tokens
    seen = window if is_in(config, CAUSAL) else 2 * window + 1  # to the left, or to either side
    local = config.layer_types.count(LOCAL) / len(config.layer_types)
    return (1 - local) * attended_tokens + local * min(attended_tokens, seen)


def _relative_positions(config: PretrainedConfig) -> int:
    """Count FLOPs forward of a position in a layer of DeBERTa's attention between contents and relative positions."""
    if config.model_type != "deberta-v2" or not config.relative_attention:
        return 0
    reach = config.max_relative_positions
    reach = config.max_position_embeddings if reach < 1 else reach
    reach = getattr(config, "position_buckets", -1) if getattr(config, "position_buckets", -1) > 0 else reach
    kinds = len({"c2p", "p2c"}.intersection(config.pos_att_type or ()))
    return kinds * 2 * 2 * reach * heads_of(config) * head_width_of(config)


def _declared_shape(module: nn.Linear | Conv1D) -> tuple[int, int]:
    return (module.nx, module.nf) if isinstance(module, Conv1D) else (module.in_features, module.out_features)


def _shared_layer_applications(model: PreTrainedModel) -> dict[str, int]:
    """Count how often a token passes through each Linear of ALBERT's shared layers, by module name.

    Layer i of L uses the weights of group floor(i / (L / G)) of G (arXiv:1909.11942).
    """
    config = model.config
    if config.model_type != "albert":
        return {}
    layers_a_group = config.num_hidden_layers / config.num_hidden_groups
    uses = Counter(int(layer / layers_a_group) for layer in range(config.num_hidden_layers))
    marker = ".albert_layer_groups."
    return {
        name: uses[int(name.partition(marker)[2].split(".")[0])] for name, _ in model.named_modules() if marker in name
    }
