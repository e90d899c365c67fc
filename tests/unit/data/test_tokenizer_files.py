"""Tokenizers as they lie in folders of the wild: vocab.txt, SentencePiece models, Git LFS pointers, code."""

from __future__ import annotations

import builtins
import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import BertTokenizer

from trainer.data import tokenizer_files
from trainer.data.tokenizer import load_tokenizer, read_vocabulary
from trainer.data.tokenizer_files import loading_note
from trainer.errors import UserError
from trainer.runtime.plain_text import foreign_message

WORDS = ["[PAD]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "的", "我", "kalo", "mi", "##lo", "ka"]
BERT_SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 12}


def write_folder(folder: Path, words: list[str] | None = None, **files: Any) -> Path:
    """A folder with vocab.txt, and JSON files by their names without suffix."""
    folder.mkdir()
    if words is not None:
        (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


IN_THE_WILD: dict[str, dict[str, Any]] = {
    "a lone vocab.txt": {},
    "no model_type, as ERNIE 1.0": {"config": BERT_SIZES},
    "bert": {"config": {"model_type": "bert", **BERT_SIZES}},
    "roberta, as RoBERTa-wwm-ext": {"config": {"model_type": "roberta", **BERT_SIZES}},
    "a model_type that transformers does not know": {"config": {"model_type": "nezha2", **BERT_SIZES}},
    "a class of other files": {"tokenizer_config": {"tokenizer_class": "RobertaTokenizer"}},
    "a class that transformers does not know": {"tokenizer_config": {"tokenizer_class": "ErnieTokenizer"}},
}


@pytest.mark.parametrize("case", IN_THE_WILD)
def test_a_vocab_txt_of_bert_is_read_as_berts(case: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", WORDS, **IN_THE_WILD[case])
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, BertTokenizer)
    assert tokenizer.tokenize("Kalo MI我的") == ["kalo", "mi", "我", "的"]
    vocabulary = read_vocabulary(tokenizer, "")
    assert (vocabulary.size, vocabulary.pad_id, vocabulary.begin_id, vocabulary.mask_id) == (12, 0, 3, 5)
    assert "read as BERT's, lower case" in loading_note(folder) and "\n" not in loading_note(folder)


def test_capitals_in_the_vocabulary_decide_where_nothing_says_it(tmp_path: Path) -> None:
    cased = write_folder(tmp_path / "cased", [*WORDS, "Kalo", "Mi"])
    assert load_tokenizer(cased).tokenize("Kalo Mi") == ["Kalo", "Mi"]
    assert "cased" in loading_note(cased)
    names = write_folder(tmp_path / "names", [*WORDS, *(f"word{number}" for number in range(200)), "HTTPURL"])
    assert load_tokenizer(names).tokenize("Kalo MI") == ["kalo", "mi"]


@pytest.mark.parametrize("lower", [True, False])
def test_tokenizer_config_decides_first(lower: bool, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "said", [*WORDS, "Kalo", "Mi"], tokenizer_config={"do_lower_case": lower})
    assert load_tokenizer(folder).tokenize("Kalo") == (["kalo"] if lower else ["Kalo"])
    assert loading_note(folder) == ""


def test_other_classes_read_their_own_vocab_txt(tmp_path: Path) -> None:
    words = ["<s>", "<pad>", "</s>", "[UNK]", *WORDS, "<mask>"]
    folder = write_folder(tmp_path / "mpnet", words, config={"model_type": "mpnet"})
    assert load_tokenizer(folder).cls_token == "<s>"
    no_bert = write_folder(tmp_path / "esm", ["<cls>", "<pad>", "<eos>", "<unk>", "L", "A", "<mask>"])
    with pytest.raises(UserError):
        load_tokenizer(no_bert)


def test_what_transformers_says_is_not_cut_at_its_first_line(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "nothing", config={"model_type": "bertish", **BERT_SIZES})
    with pytest.raises(UserError) as refused:
        load_tokenizer(folder)
    assert "\n" not in refused.value.problem and not refused.value.problem.endswith(":")
    assert foreign_message(ValueError("from one of:\n(1) a file\n(2) a class")) == "from one of: (1) a file (2) a class"
    assert len(foreign_message(ValueError("x" * 10**6))) < 600
    assert foreign_message(KeyError()) == "KeyError"


@pytest.mark.parametrize("in_file", ["tokenizer_config", "config"])
def test_code_beside_a_tokenizer_is_never_run_and_never_asked_about(
    in_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    references = {"AutoTokenizer": ["evil.EvilTokenizer", None], "AutoConfig": "evil.EvilConfig"}
    content = {"model_type": "evil", "auto_map": references, "tokenizer_class": "EvilTokenizer"}
    folder = write_folder(tmp_path / "model", **{in_file: content})
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass EvilTokenizer: pass\n")
    asked = []
    monkeypatch.setattr(builtins, "input", lambda question="": asked.append(question) or "y")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    with pytest.raises(UserError) as refused:
        load_tokenizer(folder, where="--tokenizer model")
    if in_file == "tokenizer_config":
        assert "needs code of its own (auto_map), which is never run" in refused.value.problem
        assert refused.value.where == "--tokenizer model"
    assert not asked and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.txt", "spm.model"])
def test_a_git_lfs_pointer_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 466062\n")
    with pytest.raises(UserError, match=f"'{name}' is a Git LFS pointer") as refused:
        load_tokenizer(tmp_path)
    assert "git lfs pull" in refused.value.remedy


def test_an_old_hub_name_needs_no_owner_and_a_mistyped_folder_fails_at_once(monkeypatch) -> None:
    """No network here: the hub's own error shows that it was asked."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="Cannot load a tokenizer from 'bert-base-chinese'"):
        load_tokenizer("bert-base-chinese")
    with pytest.raises(UserError, match="No tokenizer folder at 'tokeniser'") as refused:
        load_tokenizer("tokeniser")
    assert "google-bert/bert-base-chinese" in refused.value.remedy


def write_pieces(folder: Path, name: str, **options: Any) -> None:
    """Write a SentencePiece model as their trainer does."""
    (folder / "text.txt").write_text("kalo mi neru\nmi lo kalo orus\nneru lo kalo mi\n" * 40)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "made"),
        vocab_size=30,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    (folder / "text.txt").unlink()
    (folder / "made.vocab").unlink()
    (folder / "made.model").rename(folder / name)


ALBERT_PIECES = {"pad_id": 0, "unk_id": 1, "bos_id": -1, "eos_id": -1, "control_symbols": "[CLS],[SEP],[MASK]"}


@pytest.mark.parametrize(
    ("model_type", "name", "pieces"),
    [
        ("deberta-v2", "spm.model", {}),
        ("xlm-roberta", "sentencepiece.bpe.model", {}),
        ("camembert", "sentencepiece.bpe.model", {}),
        ("albert", "spiece.model", ALBERT_PIECES),
    ],
)
def test_a_sentencepiece_model_is_all_that_is_needed(
    model_type: str, name: str, pieces: dict[str, Any], tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "model", config={"model_type": model_type})
    write_pieces(folder, name, **pieces)
    tokenizer = load_tokenizer(folder)
    assert "".join(tokenizer.tokenize("kalo mi")).replace("▁", " ").strip() == "kalo mi"
    assert tokenizer.unk_token_id not in tokenizer("kalo mi").input_ids
    vocabulary = read_vocabulary(tokenizer, "")
    assert vocabulary.mask_id < vocabulary.size


def test_without_the_package_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "model", config={"model_type": "deberta-v2"})
    write_pieces(folder, "spm.model")
    monkeypatch.setattr(tokenizer_files, "sentencepiece_is_missing", lambda: True)
    with pytest.raises(UserError, match=r"SentencePiece model \(spm.model\)") as refused:
        load_tokenizer(folder)
    assert "pip install sentencepiece" in refused.value.remedy
