from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM, pipeline

from tests.commands import call_forked
from tests.conftest import write_text
from tests.preparing import folder_hashes, quiet_console
from tools.tokenizer import train_tokenizer
from trainer.data.tokenizer import load_tokenizer, read_vocabulary
from trainer.errors import UserError

SUBWORDS = ["bytelevel-bpe", "wordpiece", "unigram"]
KINDS = [*SUBWORDS, "character"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_text(tmp_path_factory.mktemp("text") / "text.txt", documents=300, seed=1)
    path.write_text(path.read_text() + "\n\nÜber café, naïve 漢字.\n" * 20)
    return path


@pytest.fixture(scope="module", params=KINDS)
def trained(request, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("trained") / "tokenizer"
    return request.param, train_tokenizer([str(text)], folder, request.param, 280, quiet_console())


def test_the_folder_loads_and_has_the_layout_of_its_model(trained: tuple[str, Path]) -> None:
    kind, folder = trained
    loaded = AutoTokenizer.from_pretrained(str(folder))
    expected = {
        "wordpiece": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
    }.get(kind, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])

    assert loaded.convert_ids_to_tokens(range(5)) == expected
    assert len(loaded) == 280 if kind != "character" else 5 < len(loaded) < 280
    assert loaded.model_max_length == 512
    ids = loaded("ka lo", "mi").input_ids
    first, second = (2, [3]) if kind == "wordpiece" else (0, [2, 2])
    assert ids[0] == first and ids[-1] == second[-1]
    assert ids.count(second[0]) == (2 if kind == "wordpiece" else 3)


def test_text_comes_back(trained: tuple[str, Path]) -> None:
    kind, folder = trained
    loaded = AutoTokenizer.from_pretrained(str(folder))
    sentence = "Über café, naïve 漢字 ka lo."
    back = loaded.decode(loaded(sentence).input_ids, skip_special_tokens=True)
    expected = sentence if kind != "wordpiece" else "uber cafe, naive 漢 字 ka lo."
    assert back.strip().replace(" ,", ",").replace(" .", ".") == expected


def test_the_identity_survives_saving(trained: tuple[str, Path], tmp_path: Path) -> None:
    kind, folder = trained
    first = load_tokenizer(folder)
    first.save_pretrained(str(tmp_path / "again"))
    again = load_tokenizer(tmp_path / "again")
    config = BertConfig() if kind == "wordpiece" else RobertaConfig()
    config.save_pretrained(str(tmp_path / "again"))  # as in a model folder
    beside_a_model = load_tokenizer(tmp_path / "again")

    identities = {read_vocabulary(loaded, "").sha256 for loaded in (first, again, beside_a_model)}
    assert len(identities) == 1


@pytest.mark.parametrize("kind", ["bytelevel-bpe", "wordpiece", "character"])
def test_the_same_text_gives_the_same_files(text: Path, tmp_path: Path, kind: str) -> None:
    """In a child of another interpreter, because the trainers' hash maps have a random order in each."""
    train_tokenizer([str(text)], tmp_path / "here", kind, 280, quiet_console())
    call_forked(train_tokenizer, [str(text)], tmp_path / "there", kind, 280)

    assert folder_hashes(tmp_path / "here") == folder_hashes(tmp_path / "there")


def test_fill_mask_works(trained: tuple[str, Path]) -> None:
    kind, folder = trained
    loaded = AutoTokenizer.from_pretrained(str(folder))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    if kind == "wordpiece":
        model = BertForMaskedLM(BertConfig(vocab_size=len(loaded), **sizes))
    else:
        config = RobertaConfig(vocab_size=len(loaded), type_vocab_size=1, pad_token_id=1, **sizes)
        model = RobertaForMaskedLM(config)
    answers = pipeline("fill-mask", model=model, tokenizer=loaded)(f"ka {loaded.mask_token} lo.", top_k=3)

    assert len(answers) == 3
    ids = loaded(f"ka {loaded.mask_token} lo.").input_ids
    assert ids.count(loaded.mask_token_id) == 1
    without_blank = loaded(f"ka{loaded.mask_token} lo.").input_ids
    if kind == "character":  # where the blank is a token as any other
        assert len(without_blank) == len(ids) - 1
    elif kind != "wordpiece":  # the mask takes the blank before it along, as a word would
        assert without_blank == ids


@pytest.mark.parametrize("kind", SUBWORDS)
def test_an_input_too_small_for_the_vocabulary_gives_a_smaller_one_and_says_so(
    text: Path, tmp_path: Path, kind: str
) -> None:
    said = io.StringIO()
    train_tokenizer([str(text)], tmp_path / "tokenizer", kind, 30_000, Console(file=said, width=200))
    size = len(AutoTokenizer.from_pretrained(tmp_path / "tokenizer"))
    assert 280 < size < 30_000
    assert f"supports {size:,} tokens, not 30,000" in said.getvalue()


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_a_vocabulary_too_small_for_the_characters_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(0x4E00 + number) for number in range(500)))
    with pytest.raises(UserError, match=r"characters of this text alone need \d+"):
        train_tokenizer([str(path)], tmp_path / "tokenizer", kind, 100, quiet_console())


def test_mistakes_are_named(text: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    (tmp_path / "empty.txt").write_text("")
    for arguments, problem in [
        ((text, tmp_path / "full", "bytelevel-bpe", 280), "not empty"),
        ((tmp_path / "empty.txt", tmp_path / "new", "bytelevel-bpe", 280), "input is empty"),
        ((text, tmp_path / "new", "wordpeace", 280), "Did you mean 'wordpiece'"),
        ((text, tmp_path / "new", "bytelevel-bpe", 100), "at least 261 tokens"),
    ]:
        source, output, kind, size = arguments
        with pytest.raises(UserError, match=problem):
            train_tokenizer([str(source)], output, kind, size, quiet_console())
