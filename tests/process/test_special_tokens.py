"""Special tokens that stand in a text: ids, text or refused; and how much of a text the tokenizer does not know."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.preparing import folder_hashes, quiet_console, read_token_documents
from tools.prepare import PrepareOptions, prepare
from tools.prepare.encode import Encoder
from tools.prepare.job import open_job
from tools.prepare.on_demand import _begun_with, _cache, _name_of, _sum_of
from tools.prepare.special_tokens import SpecialTokens, TokenTally, resolve_special_in_text
from tools.prepare.summary import describe_tokens
from tools.prepare.worker import UnitRecord, read_unit_record
from tools.tokenizer import train_tokenizer
from trainer.config import Config
from trainer.data.manifest import read_data_manifest
from trainer.data.tokenizer import load_tokenizer, read_vocabulary
from trainer.errors import UserError

TEXT = "@USER says <unk> kalo </s> mi <mask> HTTPURL[EOT]"
ROLES = ["<s>", "<pad>", "</s>", "<mask>"]


@pytest.fixture(scope="module")
def users_own(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer to which a user has added special tokens, and an eos that is not the block's end."""
    folder = tmp_path_factory.mktemp("users") / "tokenizer"
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    loaded.add_special_tokens({"additional_special_tokens": ["@USER", "HTTPURL"]})
    loaded.add_special_tokens({"eos_token": "[EOT]"})
    loaded.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def wordpiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wordpiece")
    (folder / "text.txt").write_text("kalo mi neru lo orus\n\n" * 60)
    return train_tokenizer([str(folder / "text.txt")], folder / "tokenizer", "wordpiece", 60, quiet_console())


def encoder_of(folder: Path, way: str) -> tuple[Encoder, PreTrainedTokenizerFast, SpecialTokens]:
    loaded = load_tokenizer(folder)
    special = SpecialTokens.of(loaded, read_vocabulary(loaded, ""), way)
    return Encoder(str(folder / "tokenizer.json"), np.dtype("<u2"), special=special), loaded, special


def test_with_ids_a_users_tokens_become_what_hugging_face_makes_of_them(users_own: Path) -> None:
    encoder, loaded, special = encoder_of(users_own, "ids")
    tally = TokenTally()
    (encoded,) = encoder.encode([TEXT], tally)
    tokens = loaded.convert_ids_to_tokens(encoded.ids.tolist())
    assert [token for token in tokens if token in special.ids] == ["@USER", "<unk>", "HTTPURL", "[EOT]"]
    assert not {0, 1, 2, loaded.mask_token_id} & set(encoded.ids.tolist())  # begin, pad, end and mask stay text
    assert special.text == ("<s>", "<pad>", "</s>", "<mask>")
    assert tally.as_ids == {"@USER": 1, "HTTPURL": 1, "[EOT]": 1, "<unk>": 1}
    assert tally.as_text == {"</s>": 1, "<mask>": 1}
    assert tally.unknown == 0
    bare = "@USER says kalo HTTPURL[EOT]"
    assert encoder.encode([bare])[0].ids.tolist() == loaded(bare, add_special_tokens=False).input_ids


def test_as_text_all_are_what_they_were_before_there_was_a_choice(users_own: Path) -> None:
    encoder, loaded, special = encoder_of(users_own, "text")
    tally = TokenTally()
    (encoded,) = encoder.encode([TEXT], tally)
    (plain,) = Encoder(str(users_own / "tokenizer.json"), np.dtype("<u2")).encode([TEXT])
    assert encoded.ids.tolist() == plain.ids.tolist()
    assert not set(loaded.all_special_ids) & set(encoded.ids.tolist())
    assert tally.as_text == {"@USER": 1, "HTTPURL": 1, "[EOT]": 1, "<unk>": 1, "</s>": 1, "<mask>": 1}
    assert special.recorded() == {} and not tally.as_ids


def test_ordinary_text_has_the_same_ids_whatever_the_way(tokenizer: Path, users_own: Path) -> None:
    texts = ["Kalo mi, neru; lo!  漢字\n\tmi", "", "a < b > c [SEP] @user"]
    for folder in (tokenizer, users_own):
        encoded = [encoder_of(folder, way)[0].encode(texts) for way in ("ids", "text", "refuse")]
        assert len({tuple(one.ids.tobytes() for one in found) for found in encoded}) == 1


def test_the_summary_and_the_manifest_say_what_became_of_them(users_own: Path, tmp_path: Path) -> None:
    text, output = tmp_path / "t.txt", io.StringIO()
    text.write_text("mi lo [EOT] ka\n\nlo [EOT] </s> @USER\n" * 3)
    console = Console(file=output, width=200)
    summary = prepare([str(text)], str(users_own), str(tmp_path / "d"), workers=1, console=console)
    assert "6 literal '[EOT]' became its id." in output.getvalue()
    assert "3 literal '</s>' were read as text." in output.getvalue()
    manifest = read_data_manifest(tmp_path / "d")
    assert manifest.settings["special_in_text"] == "ids"
    assert manifest.statistics["tokens_in_input"]["as_ids"] == {"[EOT]": 6, "@USER": 3} == summary.tally.as_ids
    eot = load_tokenizer(users_own).convert_tokens_to_ids("[EOT]")
    assert sum(document.count(eot) for document in read_token_documents(tmp_path / "d")) == 6

    again = prepare([str(text)], str(users_own), str(tmp_path / "d"), workers=1)
    assert again.already_prepared and again.tally == summary.tally
    with pytest.raises(UserError, match="special_in_text 'ids' instead of None"):
        open_job([str(text)], str(users_own), str(tmp_path / "d"), PrepareOptions(special_in_text="text")).finished()


def test_refused_documents_stop_or_are_counted(users_own: Path, tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text("mi lo ka\n\nlo </s> mi\n\nka HTTPURL\n\nlo\n")
    options = {"workers": 1, "special_in_text": "refuse"}
    with pytest.raises(UserError, match="holds the special token '</s>': …lo </s> mi…") as refused:
        prepare([str(text)], str(users_own), str(tmp_path / "a"), **options)
    assert refused.value.where == str(text) and "--on-bad-document skip" in refused.value.remedy
    summary = prepare([str(text)], str(users_own), str(tmp_path / "b"), **options, on_bad_document="skip")
    assert summary.refused_documents == {"special token in the text": 2}
    assert summary.documents == 2


def test_a_data_set_goes_on_as_it_was_begun(users_own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of before there was a choice records nothing, and has all special tokens as text."""
    text = tmp_path / "t.txt"
    text.write_text("mi [EOT] lo\n")
    prepare([str(text)], str(users_own), str(tmp_path / "old"), workers=1, special_in_text="text")
    assert "special_in_text" not in read_data_manifest(tmp_path / "old").settings
    before = folder_hashes(tmp_path / "old")
    assert prepare([str(text)], str(users_own), str(tmp_path / "old"), workers=1).already_prepared
    assert folder_hashes(tmp_path / "old") == before
    job_file = tmp_path / "job.json"
    for settings, way in (({}, "text"), ({"special_in_text": "refuse"}, "refuse"), ({"special_in_text": "ids"}, "ids")):
        job_file.write_text(json.dumps({"settings": settings}))
        assert resolve_special_in_text(None, [tmp_path / "none", job_file]) == way
    assert resolve_special_in_text(None, [tmp_path / "none"]) == "ids"
    assert resolve_special_in_text("text", [job_file]) == "text"
    job_file.write_text("[1]")
    assert resolve_special_in_text(None, [job_file]) == "ids"


def test_a_record_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    old = {"identity": "x", "empty_documents": 1, "refused_documents": {}, "splits": {}}
    (tmp_path / "unit-00000.json").write_text(json.dumps(old))
    assert read_unit_record(tmp_path, 0) == UnitRecord("x", empty_documents=1)


def test_a_run_that_has_begun_keeps_the_text_that_it_began_with(users_own: Path, tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text("mi [EOT] lo\n\nka mi\n")
    config = Config.model_validate(
        {
            "run": {"dir": str(tmp_path / "runs" / "my")},
            "model": {"preset": "roberta-base", "tokenizer": str(users_own)},
            "data": {"train": str(text)},
            "train": {"steps": 1},
        }
    )
    job = open_job([str(text)], str(users_own), str(tmp_path / "none"))
    sums = {file.path: _sum_of(file) for file in job.inputs.files}
    assert _begun_with(config, job, str(text), sums) is None
    as_text = open_job([str(text)], str(users_own), str(tmp_path / "none"), PrepareOptions(special_in_text="text"))
    folder = _cache(config) / _name_of(as_text, str(text), sums)
    assert folder != _cache(config) / _name_of(job, str(text), sums)
    prepare([str(text)], str(users_own), str(folder), workers=1, special_in_text="text")
    assert _begun_with(config, job, str(text), sums) is None  # of another run, for all that is known
    (tmp_path / "runs" / "my").mkdir()
    order = {"sources": [{"fingerprint": read_data_manifest(folder).fingerprint}]}
    (tmp_path / "runs" / "my" / "data_order.json").write_text(json.dumps(order))
    assert _begun_with(config, job, str(text), sums) == folder


@pytest.mark.parametrize(
    ("text", "share", "loud"),
    [
        ("ACGT" * 15_000, 1.0, True),  # one word, longer than WordPiece takes: one token
        ("今天天气很好。" * 50, 1.0, True),
        ("kalo mi neru lo orus " * 200 + "漢", 0.0, False),
        ("kalo mi neru lo orus " * 20 + "ACGT" * 200, 0.6, True),  # one token of a hundred, two thirds of the text
    ],
)
def test_text_that_the_tokenizer_does_not_know_is_said(
    text: str, share: float, loud: bool, wordpiece: Path, summary_of: Callable
) -> None:
    encoder, _, _ = encoder_of(wordpiece, "ids")
    tally = TokenTally()
    (encoded,) = encoder.encode([text], tally)
    assert tally.unknown >= 1
    assert tally.unknown_characters / tally.characters == pytest.approx(share, abs=0.1)
    (line,) = describe_tokens(summary_of(tally, len(encoded.ids)))
    assert line.startswith("WARNING") == loud
    assert "tokens are unknown" in line


@pytest.fixture
def summary_of() -> Callable:
    from tools.prepare.bad_documents import Losses
    from tools.prepare.pieces import InputFiles
    from tools.prepare.summary import PrepareSummary, SplitSummary

    def make(tally: TokenTally, tokens: int) -> PrepareSummary:
        split = SplitSummary(Path("d"), 1, tokens + 1, 0, tokens, 1)
        return PrepareSummary(Path("d"), {"train": split}, InputFiles("text", (), ()), 0, Losses(), 0.0, False, tally)

    return make


def test_looking_into_the_unknown_is_bounded(wordpiece: Path) -> None:
    encoder, _, _ = encoder_of(wordpiece, "ids")
    tally, texts = TokenTally(), ["漢字 kalo mi " * 100] * 300
    encoder.encode(texts, tally)
    assert tally.unknown == 2 * 100 * 300
    assert tally.measured_text < 1 << 15 < tally.characters
    assert tally.unknown_characters == pytest.approx(tally.unknown)
