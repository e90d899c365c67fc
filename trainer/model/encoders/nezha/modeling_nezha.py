"""NEZHA (arXiv:1909.00204): BERT without a table of positions, whose attention knows how far apart two tokens are.

The worked example of an encoder that transformers has no class for: a folder with this file and a config.json whose
`auto_map` names the classes in it. transformers loads such a folder with `trust_remote_code=True`, and maskwright
trains it with `model.code: true`. Parameters have the names of Hugging Face's former class, whose checkpoints load.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput


class NezhaConfig(PretrainedConfig):
    """Sizes as in BERT; distances beyond `max_relative_position`, in tokens, count as that one."""

    model_type = "nezha"

    vocab_size: int = 21128
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512  # what it is meant for: nothing in it is that long
    max_relative_position: int = 64
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.max_relative_position < 1:
            raise ValueError(f"max_relative_position must be at least 1, got {self.max_relative_position}")
        if self.num_attention_heads > 0 and self.hidden_size // self.num_attention_heads % 2:
            raise ValueError("hidden_size / num_attention_heads must be even: sines and cosines come in pairs")


def relative_positions(reach: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """Make the paper's vectors of the distances -reach … reach: [2·reach + 1, width], dtype and device as `like`'s.

    Element 2k is sin(distance / 10000^(2k/width)), element 2k + 1 the cosine. They are
    computed in each pass and are no buffer: what is no state is neither saved, nor rounded, nor bound to a length.
    """
    distance = torch.arange(-reach, reach + 1, device=like.device, dtype=torch.float32)
    pair = torch.arange(0, width, 2, device=like.device, dtype=torch.float32)
    angle = distance[:, None] * torch.exp(pair * (-math.log(10000.0) / width))
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1).to(like.dtype)


def spread(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Give each pair of tokens the value of its distance: [.., S, 2r + 1] → [.., S, S], of query i and key j."""
    return values.gather(-1, index.expand(*values.shape[:-1], -1))


def collect(weights: torch.Tensor, reach: int) -> torch.Tensor:
    """Add up what each query gives to the keys at each distance: [.., S, S] → [.., S, 2·reach + 1].

    The diagonals become columns where rows are read one longer than they are. Sums, and not a scatter: that adds one
    after the other, in half precision and on GPUs in any order, and most tokens are farther apart than the reach.
    """
    length = weights.shape[-1]
    row = length + 2 * reach + 1
    rows = functional.pad(weights, (reach, reach, 0, 1)).flatten(-2)[..., : length * row].unflatten(-1, (length, row))
    before, after = weights.tril(-reach).sum(-1, keepdim=True), weights.triu(reach).sum(-1, keepdim=True)
    return torch.cat((before, rows[..., 1 : 2 * reach], after), dim=-1)


class ByDistance(torch.autograd.Function):
    """`spread`, or `collect` where that is asked for: each is the gradient of the other."""

    @staticmethod
    def forward(ctx, values: torch.Tensor, index: torch.Tensor, reach: int, collects: bool) -> torch.Tensor:
        ctx.save_for_backward(index)
        ctx.reach, ctx.collects = reach, collects
        return collect(values, reach) if collects else spread(values, index)

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,), (index,) = gradients, ctx.saved_tensors
        return spread(gradient, index) if ctx.collects else collect(gradient, ctx.reach), None, None, None


class NezhaSelfAttention(nn.Module):
    """Attention of the paper: a vector of the distance is added to each key and to each value.

    No such vector is made for a pair of tokens: queries meet the 2r + 1 of them, and so do summed probabilities.
    """

    def __init__(self, config: NezhaConfig):
        super().__init__()
        self.heads = config.num_attention_heads
        self.query, self.key, self.value = (nn.Linear(config.hidden_size, config.hidden_size) for _ in range(3))
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def forward(self, hidden, visible, table, index) -> torch.Tensor:
        projections = (self.query(hidden), self.key(hidden), self.value(hidden))
        query, key, value = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in projections)
        query = query / math.sqrt(query.shape[-1])
        reach = table.shape[0] // 2
        scores = query @ key.transpose(-1, -2) + ByDistance.apply(query @ table.T, index, reach, False)
        if visible is not None:
            scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
        probabilities = self.dropout(scores.softmax(-1, dtype=torch.float32).to(value.dtype))
        context = probabilities @ value + ByDistance.apply(probabilities, index, reach, True) @ table
        return context.transpose(1, 2).flatten(2)


class NezhaResidual(nn.Module):
    """The end of each half of a layer: a projection, dropout, and the norm of the sum with what came in."""

    def __init__(self, config: NezhaConfig, width: int):
        super().__init__()
        self.dense = nn.Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.dropout(self.dense(hidden)) + residual)


class NezhaLayer(GradientCheckpointingLayer):
    def __init__(self, config: NezhaConfig):
        super().__init__()
        halves = {"self": NezhaSelfAttention(config), "output": NezhaResidual(config, config.hidden_size)}
        self.attention = nn.ModuleDict(halves)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.intermediate_size)})
        self.output = NezhaResidual(config, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden, visible, table, index) -> torch.Tensor:
        hidden = self.attention["output"](self.attention["self"](hidden, visible, table, index), hidden)
        return self.output(self.activation(self.intermediate["dense"](hidden)), hidden)


class NezhaModel(PreTrainedModel):
    """The encoder: input_ids [B, S] → last_hidden_state [B, S, hidden_size].

    `attention_mask` says what a token may look at: [B, S], 0 for padding, or [B, 1, S, S], False for other documents.
    """

    config_class, base_model_prefix, supports_gradient_checkpointing = NezhaConfig, "nezha", True
    _input_embed_layer = "word_embeddings"
    _keys_to_ignore_on_load_unexpected = [r"positions_encoding$"]  # noqa: RUF012  # sinusoids of the former class

    def __init__(self, config: NezhaConfig):
        super().__init__(config)
        width = config.hidden_size
        embeddings = {
            "word_embeddings": nn.Embedding(config.vocab_size, width, padding_idx=config.pad_token_id),
            "token_type_embeddings": nn.Embedding(config.type_vocab_size, width),
            "LayerNorm": nn.LayerNorm(width, eps=config.layer_norm_eps),
        }
        self.embeddings = nn.ModuleDict(embeddings)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        layers = nn.ModuleList(NezhaLayer(config) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layer": layers})
        self.post_init()

    def forward(self, input_ids, attention_mask=None, token_type_ids=None) -> BaseModelOutput:
        visible = None if attention_mask is None else attention_mask.bool()
        visible = visible[:, None, None, :] if visible is not None and visible.dim() == 2 else visible
        types = input_ids.new_zeros(1, 1) if token_type_ids is None else token_type_ids
        hidden = self.embeddings["word_embeddings"](input_ids) + self.embeddings["token_type_embeddings"](types)
        hidden = self.dropout(self.embeddings["LayerNorm"](hidden))
        length, heads = input_ids.shape[1], self.config.num_attention_heads
        reach = min(self.config.max_relative_position, max(1, length - 1))  # there are no others
        place = torch.arange(length, device=input_ids.device)
        index = (place - place[:, None]).clamp(-reach, reach) + reach  # of the distance j - i, [S, S]
        table = relative_positions(reach, self.config.hidden_size // heads, hidden)
        for layer in self.encoder["layer"].children():
            hidden = layer(hidden, visible, table, index)
        return BaseModelOutput(last_hidden_state=hidden)


class NezhaPredictions(nn.Module):
    def __init__(self, config: NezhaConfig):
        super().__init__()
        norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.transform = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.hidden_size), "LayerNorm": norm})
        self.activation = ACT2FN[config.hidden_act]
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))  # the decoder's, under its older name

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.transform["LayerNorm"](self.activation(self.transform["dense"](hidden))))


class NezhaForMaskedLM(PreTrainedModel):
    """The encoder with a head: logits [B, S, vocab_size], and with labels [B, S] (-100 where there is none) a loss."""

    maskwright_head = "cls.predictions"  # receives the encoder's output first, and works on each position alone
    maskwright_documents = True  # takes the attention_mask [B, 1, S, S] that keeps attention within documents
    config_class, base_model_prefix, supports_gradient_checkpointing = NezhaConfig, "nezha", True
    _keys_to_ignore_on_load_unexpected = NezhaModel._keys_to_ignore_on_load_unexpected
    _tied_weights_keys = {  # noqa: RUF012
        "cls.predictions.decoder.weight": "nezha.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }

    def __init__(self, config: NezhaConfig):
        super().__init__(config)
        self.nezha = NezhaModel(config)
        self.cls = nn.ModuleDict({"predictions": NezhaPredictions(config)})
        self.post_init()

    def get_output_embeddings(self):
        return self.cls["predictions"].decoder

    def set_output_embeddings(self, new_embeddings):
        self.cls["predictions"].decoder = new_embeddings

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, labels=None) -> MaskedLMOutput:
        logits = self.cls["predictions"](self.nezha(input_ids, attention_mask, token_type_ids).last_hidden_state)
        loss = None if labels is None else functional.cross_entropy(logits.flatten(0, -2), labels.flatten())
        return MaskedLMOutput(loss=loss, logits=logits)
