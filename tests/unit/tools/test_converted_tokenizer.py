"""The tokenizer in a converted folder: as long as the model, and with the file that older code reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertTokenizer, RobertaConfig, RobertaForMaskedLM

from tools.convert import _write_tokenizer
from tools.tokenizer import train_tokenizer
from trainer.checkpoint.manifest import MODEL_FOLDER

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 500,
}


def test_a_wordpiece_folder_has_its_vocab_txt_and_the_models_length(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "kalo", "mi", "##lo"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / MODEL_FOLDER)
    assert AutoTokenizer.from_pretrained(tmp_path / MODEL_FOLDER).model_max_length > 10**20
    model = BertForMaskedLM(BertConfig(max_position_embeddings=64, **SIZES))
    _write_tokenizer(model, tmp_path, tmp_path / "out")
    assert (tmp_path / "out" / "vocab.txt").read_text().split("\n") == [*words, ""]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").model_max_length == 64


@pytest.mark.parametrize("cased", [False, True])
def test_older_code_that_reads_vocab_txt_gives_the_same_ids(cased: bool, tmp_path: Path) -> None:
    """It takes lower case for granted, where tokenizer_config.json says nothing."""
    text = "Kalo kalo Café Über uns 中国, Lola sagt: Das ist gut."
    (tmp_path / "text.txt").write_text("\n\n".join([text] * 20), encoding="utf-8")
    train_tokenizer([str(tmp_path / "text.txt")], str(tmp_path / MODEL_FOLDER), "wordpiece", 120, cased=cased)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / MODEL_FOLDER)
    tokenizer.add_tokens(["neologism"])
    tokenizer.save_pretrained(tmp_path / MODEL_FOLDER)
    _write_tokenizer(BertForMaskedLM(BertConfig(max_position_embeddings=64, **SIZES)), tmp_path, tmp_path / "out")

    words = (tmp_path / "out" / "vocab.txt").read_text(encoding="utf-8").splitlines()
    assert {word: number for number, word in enumerate(words)} == tokenizer.get_vocab()
    old = tmp_path / "old"  # what a BertTokenizer of 2019 looks at
    old.mkdir()
    for name in ("vocab.txt", "tokenizer_config.json"):
        (old / name).write_bytes((tmp_path / "out" / name).read_bytes())
    expected = tokenizer(f"{text} Kalo neologism [MASK]").input_ids
    for folder, kind in ((tmp_path / "out", AutoTokenizer), (tmp_path / "out", BertTokenizer), (old, BertTokenizer)):
        assert kind.from_pretrained(folder)(f"{text} Kalo neologism [MASK]").input_ids == expected


@pytest.mark.parametrize(("own", "length"), [(128, 64), (32, 32), (0, 64)])
def test_the_sources_length_stays_where_the_positions_allow_it(own: int, length: int, tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nkalo\n")
    BertTokenizer.from_pretrained(tmp_path, model_max_length=own).save_pretrained(tmp_path / MODEL_FOLDER)
    _write_tokenizer(BertForMaskedLM(BertConfig(max_position_embeddings=64, **SIZES)), tmp_path, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").model_max_length == length


def test_ids_with_gaps_are_no_lines(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nkalo\n")
    BertTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / MODEL_FOLDER)
    path = tmp_path / MODEL_FOLDER / "tokenizer.json"
    path.write_text(path.read_text().replace('"kalo": 5', '"kalo": 7').replace('"kalo":5', '"kalo":7'))
    _write_tokenizer(BertForMaskedLM(BertConfig(max_position_embeddings=64, **SIZES)), tmp_path, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()["kalo"] == 7
    assert not (tmp_path / "out" / "vocab.txt").exists()


@pytest.mark.parametrize(("positions", "length"), [(66, 64), (5000, 512)])
def test_other_kinds_have_none_and_keep_a_shorter_length(
    positions: int, length: int, tokenizer: Path, tmp_path: Path
) -> None:
    """RoBERTa's positions start behind the padding id, and `tokenizer train` writes 512."""
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(tmp_path / MODEL_FOLDER)
    model = RobertaForMaskedLM(RobertaConfig(max_position_embeddings=positions, pad_token_id=1, **SIZES))
    _write_tokenizer(model, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out" / "vocab.txt").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").model_max_length == length
