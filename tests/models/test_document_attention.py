"""Attention within documents, on a tiny model of each class: as if every document had been alone."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from tests.tiny_models import VOCABULARY_SIZE, lively_model, tiny_model, vocabulary, write_config
from trainer.data.batch import Documents
from trainer.data.documents import cumulative_lengths, positions_in_documents
from trainer.errors import UserError
from trainer.model import document_attention
from trainer.model.build import build_model, constant_inputs
from trainer.model.classes import model_class
from trainer.model.document_attention import DocumentAttention
from trainer.model.hf_config import DOCUMENT_ATTENTION_MODELS, build_config
from trainer.model.model_code import SHIPPED

CPU = torch.device("cpu")
BLOCKS, SEQ_LEN = 3, 24
LENGTHS = [
    [24],
    [7, 1, 1, 12, 3],
    [1, 22, 1],
]  # of the documents of each block; 12 and 22 outgrow the local window of 4
MODELS = sorted({*DOCUMENT_ATTENTION_MODELS, *SHIPPED})  # those that ship have a block mask in both ways


def varlen_by_definition(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
) -> torch.Tensor:
    """What torch documents of `varlen_attn`, which has no CPU kernel: each sequence by itself, within the window."""
    assert cu_seq_q is cu_seq_k and cu_seq_q.dtype == torch.int32
    borders = cu_seq_q.tolist()
    assert borders[0] == 0 and borders[-1] == len(query)
    assert max_q == max_k >= max(np.diff(borders))
    outputs = []
    for start, end in itertools.pairwise(borders):
        place = torch.arange(end - start)
        distance = place - place[:, None]  # of the key from the query
        left, right = (len(query) if size < 0 else size for size in window_size)
        seen = (distance >= -left) & (distance <= right)
        parts = [states[start:end].transpose(0, 1) for states in (query, key, value)]
        outputs.append(scaled_dot_product_attention(*parts, attn_mask=seen, scale=scale).transpose(0, 1))
    return torch.cat(outputs)


@pytest.fixture(params=["block mask", "variable length"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to the same result; the kernel of the second runs on GPUs only, so its definition stands for it."""
    if request.param == "variable length":
        monkeypatch.setattr(document_attention, "_obstacle_to_varlen", lambda *_: None)
        monkeypatch.setattr(document_attention, "varlen_attn", varlen_by_definition)
    return request.param


def starts_of(lengths: list[list[int]]) -> np.ndarray:
    starts = np.zeros((len(lengths), SEQ_LEN), bool)
    for row, block in enumerate(lengths):
        assert sum(block) == SEQ_LEN
        starts[row, np.cumsum([0, *block[:-1]])] = True
    return starts


def documents_of(lengths: list[list[int]]) -> Documents:
    starts = starts_of(lengths)
    return Documents(
        torch.from_numpy(positions_in_documents(starts)),
        torch.from_numpy(cumulative_lengths(starts)),
    )


def random_ids(rows: int = BLOCKS, seed: int = 1) -> torch.Tensor:
    return torch.randint(4, VOCABULARY_SIZE, (rows, SEQ_LEN), generator=torch.Generator().manual_seed(seed))


class Packed:
    """A model that attends within documents, called as the engine calls it."""

    def __init__(self, model: Any, device: torch.device = CPU) -> None:
        self.model, self.attention = model, DocumentAttention(model, device)

    def arguments(self, lengths: list[list[int]]) -> dict[str, Any]:
        return {**constant_inputs(self.model, SEQ_LEN, CPU), **self.attention.inputs(documents_of(lengths))}

    def __call__(self, input_ids: torch.Tensor, lengths: list[list[int]]) -> torch.Tensor:
        return self.model(input_ids=input_ids, **self.arguments(lengths)).logits


def alone(model: Any, input_ids: torch.Tensor, lengths: list[list[int]]) -> torch.Tensor:
    """Logits of each document by itself through the stock class, as plain transformers would be called."""
    rows = [
        torch.cat([model(input_ids=part[None]).logits[0] for part in ids.split(block)])
        for ids, block in zip(input_ids, lengths, strict=True)
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("model_type", MODELS)
def test_a_document_in_a_block_is_what_it_is_alone(model_type, way, tmp_path):
    model = lively_model(tmp_path, model_type).eval()
    ids = random_ids()
    with torch.no_grad():
        expected = alone(model, ids, LENGTHS)
        found = Packed(model)(ids, LENGTHS)
        across = model(input_ids=ids, **constant_inputs(model, SEQ_LEN, CPU)).logits
    assert (found - expected).abs().max() < 1e-5
    assert (across[1:] - expected[1:]).abs().max() > 0.1, "the test would not see the difference"


@pytest.mark.parametrize("model_type", MODELS)
def test_changing_one_document_leaves_the_others_bit_for_bit(model_type, way, tmp_path):
    model = lively_model(tmp_path, model_type).eval()
    ids = random_ids()
    changed = ids.clone()
    changed[1, 9:21] = random_ids(seed=2)[1, 9:21]
    others = torch.ones(BLOCKS, SEQ_LEN, dtype=torch.bool)
    others[1, 9:21] = False
    with torch.no_grad():
        plain = [model(input_ids=each, **constant_inputs(model, SEQ_LEN, CPU)).logits for each in (ids, changed)]
        packed = Packed(model)
        before, after = packed(ids, LENGTHS), packed(changed, LENGTHS)
    assert torch.equal(before[others], after[others])
    assert ((before - after)[~others].abs().amax(dim=-1) > 1e-3).all()
    elsewhere_in_the_block = others.clone()
    elsewhere_in_the_block[[0, 2]] = False
    assert (plain[0] - plain[1])[elsewhere_in_the_block].abs().max() > 1e-3


@pytest.mark.parametrize("model_type", MODELS)
def test_a_border_at_every_place(model_type, way, tmp_path):
    model = lively_model(tmp_path, model_type).eval()
    lengths = [[place, SEQ_LEN - place] for place in range(1, SEQ_LEN)]
    ids = random_ids(rows=len(lengths))
    with torch.no_grad():
        expected = alone(model, ids, lengths)
        assert (Packed(model)(ids, lengths) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("model_type", MODELS)
def test_one_document_that_fills_a_block_is_plain_attention(model_type, way, tmp_path):
    model = lively_model(tmp_path, model_type).eval()
    ids = random_ids()
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        assert (Packed(model)(ids, [[SEQ_LEN]] * BLOCKS) - plain).abs().max() < 1e-5
        # And a forward pass without documents is the stock class's own, whatever way is installed.
        assert torch.equal(model(input_ids=ids).logits, plain)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "activation checkpointing"])
@pytest.mark.parametrize("model_type", MODELS)
def test_gradients_are_those_of_the_documents_alone(model_type, checkpointing, way, tmp_path):
    model = lively_model(tmp_path, model_type)
    ids, labels = random_ids(), random_ids(seed=3)

    def gradients(logits: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients(alone(model, ids, LENGTHS))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = gradients(Packed(model)(ids, LENGTHS))
    assert found.keys() == expected.keys() and len(found) > 20
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name in expected:
        assert (found[name] - expected[name]).abs().max() < 1e-5 * largest, name


@pytest.mark.parametrize("model_type", ["roberta", "modernbert", "nezha"])
def test_one_graph_serves_every_border(model_type, tmp_path):
    model = lively_model(tmp_path, model_type)
    packed = Packed(model)
    cuts = [LENGTHS, [[3, 21], [24], [10, 10, 4]], [[1] * 24] * 3]
    expected = [packed(random_ids(), lengths) for lengths in cuts]
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    model.compile(backend=graphs, fullgraph=True, dynamic=False)
    for lengths, eager in zip(cuts, expected, strict=True):
        logits = packed(random_ids(), lengths)
        assert torch.allclose(logits, eager, atol=1e-5)
        cross_entropy(logits.flatten(0, 1), random_ids(seed=3).flatten()).backward()
    assert graphs.frame_count == 1


@pytest.mark.parametrize("model_type", ["roberta", "bert", "modernbert"])
def test_the_kernel_takes_what_it_is_given(model_type, tmp_path, monkeypatch):
    """Through torch's real `varlen_attn` on the meta device: signature, shapes, dtypes and autograd, but no values."""
    monkeypatch.setattr(document_attention, "_obstacle_to_varlen", lambda *_: None)
    calls = []

    def recorded(*arguments: Any, **options: Any) -> torch.Tensor:
        calls.append((arguments, options))
        return varlen_attn(*arguments, **options)

    varlen_attn = document_attention.varlen_attn
    monkeypatch.setattr(document_attention, "varlen_attn", recorded)
    settings = write_config(tmp_path, model_type)
    config = build_config(settings, vocabulary(), SEQ_LEN)
    with torch.device("meta"):
        model = model_class(config)._from_config(config, dtype=torch.bfloat16)
        attention = DocumentAttention(model, torch.device("meta"))
        documents = Documents(torch.zeros(BLOCKS, SEQ_LEN, dtype=torch.int64), torch.zeros(9, dtype=torch.int32))
        ids = torch.zeros(BLOCKS, SEQ_LEN, dtype=torch.int64)
        logits = model(input_ids=ids, **attention.inputs(documents)).logits
        logits.float().sum().backward()
        assert logits.shape == (BLOCKS, SEQ_LEN, VOCABULARY_SIZE)
        assert all(p.grad is not None for name, p in model.named_parameters() if "layer" in name)
    assert len(calls) == config.num_hidden_layers
    heads = config.num_attention_heads
    for arguments, _ in calls:
        for states in arguments[:3]:
            assert states.shape == (BLOCKS * SEQ_LEN, heads, config.hidden_size // heads)
            assert states.dtype == torch.bfloat16 and states.stride(-1) == 1
        assert arguments[3] is documents.cu_seqlens and arguments[5] == SEQ_LEN
    local = {options["window_size"] for _, options in calls}
    assert local == ({(-1, -1), (4, 4)} if model_type == "modernbert" else {(-1, -1)})


@pytest.mark.parametrize("model_type", ["roberta", "modernbert"])
def test_the_kernel_compiles_into_one_graph_for_all_batches_of_a_shape(model_type, tmp_path, monkeypatch):
    monkeypatch.setattr(document_attention, "_obstacle_to_varlen", lambda *_: None)
    config = build_config(write_config(tmp_path, model_type), vocabulary(), SEQ_LEN)
    with torch.device("meta"):
        model = model_class(config)._from_config(config, dtype=torch.bfloat16)
    attention = DocumentAttention(model, torch.device("meta"))
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    model.compile(backend=graphs, fullgraph=True, dynamic=False)
    found = []
    for cuts in ([[24], [24], [20, 4]], [[6, 18], [24], [24]], LENGTHS):
        documents = Documents(*(tensor.to("meta") for tensor in documents_of(cuts)))
        model(input_ids=random_ids().to("meta"), **attention.inputs(documents)).logits.float().sum().backward()
        found.append((len(documents.cu_seqlens), graphs.frame_count))
    assert found == [(5, 1), (5, 1), (17, 2)]


class Gpu:
    """Stands for a CUDA device of some compute capability; nothing runs on it."""

    type = "cuda"


@pytest.mark.parametrize(
    ("capability", "dtype", "changes", "words"),
    [
        ((9, 0), torch.bfloat16, {}, "variable-length flash attention"),
        ((8, 0), torch.float16, {}, "variable-length flash attention"),
        ((7, 5), torch.float16, {}, "a block mask (flash attention needs an NVIDIA GPU"),
        ((9, 0), torch.float32, {}, "a block mask (flash attention has no fp32)"),
        ((9, 0), torch.bfloat16, {"attention_probs_dropout_prob": 0.1}, "dropout, and that of attention is 0.1)"),
        ((9, 0), torch.bfloat16, {"hidden_size": 48}, "a multiple of 8 up to 256, not of 12)"),
    ],
)
def test_the_way_and_its_reason_are_told(capability, dtype, changes, words, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    model = tiny_model(tmp_path, "roberta", **changes).to(dtype)
    assert words in DocumentAttention(model, Gpu()).note  # type: ignore[arg-type]
    assert DocumentAttention(model, CPU).note == "attention: by a block mask (no GPU)"


@pytest.mark.parametrize("model_type", ["esm", "eurobert", "mpnet"])
def test_other_classes_are_refused_with_those_that_work(model_type, tmp_path):
    settings = write_config(tmp_path, model_type).model_copy(update={"document_attention": True})
    with pytest.raises(UserError) as caught:
        build_model(settings, vocabulary(), SEQ_LEN, seed=0)
    assert caught.value.where == "model.document_attention"
    assert "cannot keep its attention within documents" in caught.value.problem
    names = "BERT, CamemBERT, DistilBERT, ELECTRA, ERNIE, GPT-2, GPT-NeoX, Llama, ModernBERT, ModernBERT's decoder, "
    names += "OPT, Qwen3, RoBERTa, XLM-RoBERTa"
    assert names in caught.value.remedy
