"""The tokenizer in a converted folder: as long as the model, and with the file that older code reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertTokenizer, RobertaConfig, RobertaForMaskedLM

from tools.convert import _write_tokenizer
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
