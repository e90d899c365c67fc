"""What training reads of a tokenizer: rows, special ids, ids that no token has."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trainer.config import ModelConfig, ObjectiveConfig
from trainer.data.blocks import Blocks
from trainer.data.manifest import token_dtype
from trainer.data.tokenizer import load_tokenizer, read_vocabulary
from trainer.errors import UserError
from trainer.model.build import build_model
from trainer.objectives.mlm import MaskedSamples

ROLES = {"cls_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def write_tokenizer(folder: Path, words: dict[str, int]) -> Path:
    """A tokenizer of words with these ids; its special tokens have the first five."""
    vocabulary = {**{token: number for number, token in enumerate(ROLES.values())}, **words}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ROLES).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def with_holes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ids 0 to 7 and 20 to 23: 12 tokens that need 24 rows."""
    words = {f"w{number}": number for number in (5, 6, 7, 20, 21, 22, 23)}
    return write_tokenizer(tmp_path_factory.mktemp("holes") / "tokenizer", words)


def test_rows_go_up_to_the_largest_id(with_holes: Path) -> None:
    tokenizer = load_tokenizer(with_holes)
    vocabulary = read_vocabulary(tokenizer, "")
    assert len(tokenizer) == 12
    assert vocabulary.size == 24
    assert vocabulary.unused_ids == tuple(range(8, 20))
    assert token_dtype(vocabulary.size) == "<u2"


def test_without_holes_rows_are_the_tokens(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "t", {f"w{number}": number for number in range(5, 9)}))
    tokenizer.add_tokens(["mi", "lo"])
    vocabulary = read_vocabulary(tokenizer, "")
    assert vocabulary.size == len(tokenizer) == 11
    assert vocabulary.unused_ids == ()


def test_of_two_ids_for_one_token_none_is_unused(tmp_path: Path) -> None:
    """As in CamemBERT's vocabulary, where <unk> stands twice; runs that drew both draw both."""
    pieces = [(token, 0.0) for token in (*ROLES.values(), "▁mi", "<unk>", "▁lo")]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram(pieces, unk_id=3)), **ROLES)
    vocabulary = read_vocabulary(tokenizer, "")
    assert (vocabulary.size, vocabulary.unused_ids) == (8, ())


def test_an_id_far_off_is_refused_before_a_table_is_made(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "t", {"mi": 5})
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"mi": 5', '"mi": 4000000000'))
    with pytest.raises(UserError, match=r"has the id 4,000,000,000") as refused:
        read_vocabulary(load_tokenizer(folder), str(folder))
    assert refused.value.where == str(folder)


def test_masks_never_show_an_id_without_a_token(with_holes: Path) -> None:
    vocabulary = read_vocabulary(load_tokenizer(with_holes), "")
    objective = MaskedSamples(ObjectiveConfig(replace_mask=0.0, replace_random=1.0), vocabulary, seq_len=34)
    blocks = np.tile(np.array([5, 6, 7, 20, 21, 22, 23, 5], np.int64), (64, 4))
    shown = objective.make_batch(Blocks(blocks), np.arange(64, dtype=np.uint64), seed=1)
    assert set(np.unique(shown.inputs["input_ids"].numpy()).tolist()) == {0, 2, 5, 6, 7, 20, 21, 22, 23}
    assert {20, 21, 22, 23} & set(shown.labels["mlm"].tolist())


def test_models_get_a_row_for_each_id(with_holes: Path, tmp_path: Path) -> None:
    """From random weights, and from a checkpoint that has as many rows as the tokenizer has tokens."""
    vocabulary = read_vocabulary(load_tokenizer(with_holes), "")
    (tmp_path / "bert.json").write_text(json.dumps({"model_type": "bert", "vocab_size": 12, **SIZES}))
    built = build_model(ModelConfig(config=str(tmp_path / "bert.json"), tokenizer=str(with_holes)), vocabulary, 16, 1)
    assert built.model.get_input_embeddings().num_embeddings == 24
    built.model.resize_token_embeddings(12)
    built.model.save_pretrained(tmp_path / "checkpoint")
    continued = ModelConfig(from_pretrained=str(tmp_path / "checkpoint"), tokenizer=str(with_holes))
    grown = build_model(continued, vocabulary, 16, 1)
    assert grown.model.get_input_embeddings().num_embeddings == grown.model.config.vocab_size == 24
    assert any("from 12 to 24" in note for note in grown.notes)
