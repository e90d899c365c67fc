"""A teacher of a real class: what it teaches is what its stock class gives, and what cannot teach is a card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertModel

from tests.tiny_models import (
    BLOCKS,
    PREDICTIONS,
    SEQ_LEN,
    VOCABULARY_SIZE,
    assert_same_gradients,
    family_of_type,
    gradients,
    masked_batch,
    saved,
    tiny_model,
    vocabulary,
    write_config,
)
from trainer.config import Config
from trainer.config.file import parse_config
from trainer.data.batch import Batch
from trainer.errors import DamagedError, UserError
from trainer.model import prediction_head
from trainer.model.build import build_model
from trainer.model.classes import CAUSAL, MASKED
from trainer.model.forward import Forward
from trainer.model.teacher import check_same_ids, check_teacher, load_teacher, teacher_config
from trainer.objectives.objective import loss_sums
from trainer.objectives.registry import make_criterion
from trainer.sizing.flops import flops_per_token

CPU = torch.device("cpu")


def config_of(folder: Path, student: str, teacher: Path | str, precision: str = "fp32", **settings: Any) -> Config:
    own = folder / "own"
    own.mkdir(exist_ok=True)
    model = write_config(own, student, **settings.pop("changes", {}))
    name, seq_len = "clm" if family_of_type(student) == CAUSAL else "mlm", settings.pop("seq_len", SEQ_LEN)
    raw: dict[str, Any] = {
        "run": {"dir": "unused"},
        "model": {"config": model.config, "tokenizer": "unused", **settings.pop("model", {})},
        "objective": {"name": name, "teacher": {"model": str(teacher), **settings}},
        "data": {"train": "unused", "seq_len": seq_len},
        "train": {"steps": 1, "precision": precision},
    }
    return parse_config(raw, "test")


def check(config: Config, size: int = VOCABULARY_SIZE, family: str = MASKED) -> str:
    return check_teacher(config, vocabulary(size), [config.data.seq_len], family)


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "roberta", "modernbert", "gpt2", "llama", "opt"])
def test_logits_and_states_are_those_of_the_stock_class(model_type: str, tmp_path: Path) -> None:
    source, family = saved(tmp_path, model_type), family_of_type(model_type)
    config = config_of(tmp_path, model_type, source)
    assert check(config, family=family).startswith(type(tiny_model(tmp_path, model_type)).__name__)
    teacher = load_teacher(config, vocabulary(), family, CPU)
    assert teacher is not None
    ids, index, *_ = masked_batch()
    found = index if family == MASKED else None
    states, rows = teacher({"input_ids": ids}, found)
    stock = tiny_model(tmp_path, model_type).eval()
    with torch.no_grad():
        output = stock(input_ids=ids, output_hidden_states=True)
    expected = output.logits.flatten(0, 1)
    torch.testing.assert_close(teacher.logits(rows), expected if found is None else expected[found])
    if model_type != "opt":  # whose last hidden states are not yet normed
        torch.testing.assert_close(states, output.hidden_states[-1])
    assert not rows.requires_grad


def batch_of(family: str) -> Batch:
    ids, index, labels, _ = masked_batch()
    if family == MASKED:
        soft = torch.zeros_like(labels)
        return Batch({"input_ids": ids}, {"mlm": labels, "soft": soft, "cosine": torch.zeros(ids.numel())}, index)
    counted = torch.zeros(ids.numel(), dtype=torch.int64)
    return Batch({"input_ids": ids}, {"clm": ids.roll(-1, 1).flatten(), "soft": counted, "cosine": counted}, None)


def test_a_causal_teachers_logits_are_made_in_pieces_with_the_same_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path, "gpt2", saved(tmp_path, "gpt2"))
    results, most = [], []
    for at_once in (1 << 25, 7 * VOCABULARY_SIZE):
        monkeypatch.setattr(prediction_head, "LOGITS_AT_ONCE", at_once)
        teacher = load_teacher(config, vocabulary(), CAUSAL, CPU)
        assert teacher is not None
        made, logits = [], teacher.logits
        monkeypatch.setattr(
            teacher, "logits", lambda rows, made=made, logits=logits: made.append(len(rows)) or logits(rows)
        )
        student = build_model(config.model, vocabulary(), SEQ_LEN, 1, CAUSAL).model
        criterion, network = make_criterion(config, taught_by=teacher), Forward(student, CPU)
        sums = loss_sums(criterion, network, batch_of(CAUSAL), 1)
        sums.sum().backward()
        results.append((sums.detach(), gradients(student)))
        most.append(max(made))
    assert most == [BLOCKS * SEQ_LEN, 7]
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=1e-5)
    assert_same_gradients(results[1][1], results[0][1])


@pytest.mark.parametrize("family", [MASKED, CAUSAL])
def test_who_copies_its_teacher_has_nothing_to_learn_of_it(family: str, tmp_path: Path) -> None:
    model_type = "bert" if family == MASKED else "gpt2"
    source = saved(tmp_path, model_type)
    config = config_of(tmp_path, model_type, source)
    layers = {"layers_from": {"model": str(source), "layers": [0, 1]}}
    config = config_of(tmp_path, model_type, source, model=layers)
    student = build_model(config.model, vocabulary(), SEQ_LEN, 5, family).model.eval()
    criterion = make_criterion(config, taught_by=load_teacher(config, vocabulary(), family, CPU))
    _, soft, cosine = loss_sums(criterion, Forward(student, CPU), batch_of(family), 1).flatten().tolist()
    assert soft == 0 and cosine == pytest.approx(0, abs=1e-4)


def test_a_class_that_names_its_head_teaches_its_states(tmp_path: Path) -> None:
    source = tmp_path / "checkpoint"
    model = tiny_model(tmp_path, "nezha")
    model.save_pretrained(source)
    config = config_of(tmp_path, "nezha", source)
    assert config.objective.teacher is not None and config.objective.teacher.cosine
    check(config)
    teacher = load_teacher(config, vocabulary(), MASKED, CPU)
    assert teacher is not None
    states, _ = teacher({"input_ids": masked_batch()[0]}, masked_batch()[1])
    assert states is not None and states.shape[-1] == model.config.hidden_size


def test_its_dropout_is_off_and_its_tables_of_angles_keep_their_precision(tmp_path: Path) -> None:
    source = saved(tmp_path, "modernbert")
    fields = json.loads((source / "config.json").read_text())
    dropouts = dict.fromkeys(("attention_dropout", "mlp_dropout", "embedding_dropout"), 0.5)
    (source / "config.json").write_text(json.dumps({**fields, **dropouts}))
    teacher = load_teacher(config_of(tmp_path, "modernbert", source, "bf16"), vocabulary(), MASKED, CPU)
    assert teacher is not None and teacher.model.config.attention_dropout == 0
    assert {weight.dtype for weight in teacher.model.parameters()} == {torch.bfloat16}
    angles = [buffer for name, buffer in teacher.model.named_buffers() if "inv_freq" in name]
    assert angles and all(buffer.dtype == torch.float32 for buffer in angles)
    inputs = {"input_ids": masked_batch()[0]}
    assert torch.equal(teacher(inputs, None)[1], teacher(inputs, None)[1])


def test_the_same_weights_are_the_same_teacher_wherever_they_lie(tmp_path: Path) -> None:
    def identity(folder: Path, seed: int, precision: str = "fp32") -> str:
        folder.mkdir()
        source = saved(folder, "bert", seed=seed)
        found = load_teacher(config_of(folder, "bert", source, precision), vocabulary(), MASKED, CPU)
        assert found is not None
        return found.identity

    one = identity(tmp_path / "one", seed=0)
    assert identity(tmp_path / "two", seed=0, precision="bf16") == one != identity(tmp_path / "three", seed=1)


def test_flops_of_the_teacher_are_those_of_its_forward_pass(tmp_path: Path) -> None:
    config = config_of(tmp_path, "distilbert", saved(tmp_path, "bert"))
    teacher = load_teacher(config, vocabulary(), MASKED, CPU)
    assert teacher is not None
    ids, index, *_ = masked_batch()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        teacher({"input_ids": ids}, index)
    counted = flops_per_token(teacher.model, SEQ_LEN, PREDICTIONS / SEQ_LEN) * BLOCKS * SEQ_LEN
    assert counted == pytest.approx(counter.get_total_flops(), rel=1e-12)


@pytest.mark.parametrize(
    ("student", "teacher", "settings", "said"),
    [
        ("bert", {"hidden_size": 16}, {}, "width of 16 and the model's one of 32"),
        ("bert", {"max_position_embeddings": 24}, {"seq_len": 32}, "needs 32 positions; the model has 24"),
        ("convbert", {}, {}, "Where the last hidden states of 'convbert' are is not known"),
        (
            "bert",
            {"vocab_size": 150, "pad_token_id": 1},
            {},
            "The teacher has 150 rows of tokens, and the tokenizer 200",
        ),
    ],
)
def test_what_cannot_teach_is_a_card(
    student: str, teacher: dict[str, Any], settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    size = teacher.pop("vocab_size", None)
    model = tiny_model(tmp_path, "bert", **teacher)
    if size is not None:
        model.resize_token_embeddings(size)
    model.save_pretrained(tmp_path / "checkpoint")
    config = config_of(tmp_path, student, tmp_path / "checkpoint", **settings)
    for start in (
        lambda: check(config),
        lambda: teacher_config(config, vocabulary(), MASKED),
        lambda: load_teacher(config, vocabulary(), MASKED, CPU),
    ):
        with pytest.raises(UserError) as caught:
            start()
        assert said in str(caught.value) and "from_pretrained" not in str(caught.value)
        assert "teacher" in str(caught.value).lower()


def test_a_teacher_of_another_width_teaches_without_cosine_and_more_rows_are_no_hindrance(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, "bert", hidden_size=16)
    model.resize_token_embeddings(VOCABULARY_SIZE + 24)
    model.save_pretrained(tmp_path / "checkpoint")
    config = config_of(tmp_path, "bert", tmp_path / "checkpoint", cosine=0.0)
    check(config)
    student = build_model(config.model, vocabulary(), SEQ_LEN, 5).model
    criterion = make_criterion(config, taught_by=load_teacher(config, vocabulary(), MASKED, CPU))
    batch = batch_of(MASKED)
    of_text, soft = loss_sums(criterion, Forward(student, CPU), batch, 1).flatten()
    assert soft > 0 and of_text > 0


def test_an_encoder_without_its_head_and_a_model_of_another_kind_cannot_teach(tmp_path: Path) -> None:
    source = saved(tmp_path, "bert")
    BertModel.from_pretrained(source).save_pretrained(source)
    with pytest.raises(UserError, match=r"has no weights for cls\.predictions") as caught:
        check(config_of(tmp_path, "bert", source))
    assert caught.value.where == "objective.teacher.model"
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="The teacher: 'gpt2', as configured, is no encoder"):
        check(config_of(tmp_path, "bert", saved(tmp_path / "other", "gpt2")))
    with pytest.raises(UserError, match="The teacher") as caught:
        check(config_of(tmp_path, "bert", tmp_path / "nothing"))
    assert "objective.teacher.model" in str(caught.value)


def test_a_run_in_the_place_of_a_teacher_is_told_how_to_become_one(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / "step-00000010").mkdir(parents=True)
    with pytest.raises(UserError) as caught:
        check(config_of(tmp_path, "bert", tmp_path / "run"))
    assert (
        "maskwright convert" in caught.value.remedy and "set objective.teacher.model=run-model" in caught.value.remedy
    )


def test_weights_that_are_not_finite_are_damage(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, "bert")
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[3] = torch.nan
    model.save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(DamagedError, match="The teacher") as caught:
        load_teacher(config_of(tmp_path, "bert", tmp_path / "checkpoint"), vocabulary(), MASKED, CPU)
    assert caught.value.where == "objective.teacher.model"


def test_document_attention_that_the_teacher_cannot_keep_is_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path, "bert", saved(tmp_path, "albert"), model={"document_attention": True}, cosine=0.0)
    with pytest.raises(UserError, match="The teacher: AlbertForMaskedLM cannot keep its attention within documents"):
        check(config)


def test_another_tokenizer_is_refused_and_none_is_said(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    def config(teacher: Path) -> Config:
        made = config_of(tmp_path, "bert", teacher)
        return made.model_copy(update={"model": made.model.model_copy(update={"tokenizer": str(tokenizers["one"])})})

    assert check_same_ids(config(tokenizers["one"])) is None
    with pytest.raises(UserError, match=r"The teacher has another tokenizer: \d+ of 300 tokens") as caught:
        check_same_ids(config(tokenizers["other"]))
    assert caught.value.where.startswith("objective.teacher.model=")
    assert "has no tokenizer of its own" in str(check_same_ids(config(saved(tmp_path, "bert"))))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two of as many tokens, from other texts."""
    from tests.conftest import write_text
    from tests.preparing import quiet_console
    from tools.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizers")
    found = {}
    for seed, name in enumerate(("one", "other")):
        text = write_text(folder / f"{name}.txt", documents=60, seed=seed)
        found[name] = train_tokenizer([str(text)], folder / name, "bytelevel-bpe", 300, quiet_console())
    return found
