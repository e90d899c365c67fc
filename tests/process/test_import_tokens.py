"""Imported tokens become the shards that `prepare` would have written; the user's files stay as they are."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from tests.commands import assert_one_card, maskwright
from tests.preparing import Importer, folder_hashes, quiet_console, read_token_documents
from tests.token_files import write_dataset, write_datatrove, write_megatron
from tools.import_tokens import import_tokens
from tools.inspect import show, verify
from trainer.data.manifest import IMPORT_WORK_FOLDER, read_data_manifest
from trainer.errors import EXIT_DAMAGED, EXIT_FINISHED, EXIT_USER_MISTAKE, UserError

BEGIN, PAD, END = 0, 1, 2


def in_halves(ids: list[int]) -> list[list[int]]:
    return [[BEGIN, *ids[:3], END], [BEGIN, *ids[3:], END]]


WAYS: dict[str, Callable[[Path, list[list[int]]], Path]] = {
    "megatron with eod": lambda path, ids: write_megatron(path, [[[*one, END]] for one in ids]),
    "megatron without eod": lambda path, ids: write_megatron(path, [[one] for one in ids]),
    "megatron of 4 bytes": lambda path, ids: write_megatron(path, [[[*one, END]] for one in ids], "<i4"),
    "megatron of 8 bytes": lambda path, ids: write_megatron(path, [[[*one, END]] for one in ids], "<i8"),
    "megatron of a Hugging Face tokenizer": lambda path, ids: write_megatron(
        path, [[[BEGIN, *one, END, END]] for one in ids]
    ),
    "megatron with sentences": lambda path, ids: write_megatron(path, [in_halves(one) for one in ids]),
    "megatron with empty documents": lambda path, ids: write_megatron(
        path, [[], [[END]], *([[*one, END]] for one in ids), [[]]]
    ),
    "datatrove with eos": lambda path, ids: write_datatrove(path.with_suffix(".ds"), [[*one, END] for one in ids]),
    "datatrove without eos": lambda path, ids: write_datatrove(path.with_suffix(".ds"), ids),
    "datatrove of 4 bytes": lambda path, ids: write_datatrove(
        path.with_suffix(".ds"), [[BEGIN, *one, END] for one in ids], token_size=4
    ),
    "datatrove without metadata": lambda path, ids: write_datatrove(
        path.with_suffix(".ds"), [[*one, END] for one in ids], token_size=4, tokenizer_name=None
    ),
    "datasets": lambda path, ids: write_dataset(path, [[BEGIN, *one, END] for one in ids]),
    "datasets with padding": lambda path, ids: write_dataset(
        path, [[], *([BEGIN, *one, END, PAD, PAD] for one in ids)], shards=3
    ),
}
LINKED = ("megatron with eod", "datatrove with eos")


@pytest.mark.parametrize("way", WAYS)
def test_an_import_gives_the_bytes_that_prepare_gives(
    way: str, tmp_path: Path, documents: list[list[int]], prepared: Path, run_import: Importer, capsys
) -> None:
    source = WAYS[way](tmp_path / "tokens", documents)
    before = folder_hashes(tmp_path)
    summary = run_import(source, tmp_path / "data")

    for suffix in ("tok", "doc", "sum"):
        name = f"shard-00000.{suffix}"
        assert (tmp_path / "data" / name).read_bytes() == (prepared / name).read_bytes()
    reference, manifest = read_data_manifest(prepared), read_data_manifest(tmp_path / "data")
    assert manifest.fingerprint == reference.fingerprint
    for name in ("dtype", "tokenizer_sha256", "vocabulary_size", "separator_id", "tokens", "documents", "shards"):
        assert getattr(manifest, name) == getattr(reference, name)
    longest = "longest_document_tokens"
    assert manifest.statistics[longest] == reference.statistics[longest]
    assert manifest.statistics["empty_documents_in_input"] == {
        "megatron with empty documents": 3,
        "datasets with padding": 1,
    }.get(way, 0)
    assert str(tmp_path) not in manifest.to_json()
    assert summary.documents == 60
    assert summary.linked == (1 if way in LINKED else 0)
    verify(tmp_path / "data", console=quiet_console())
    show(tmp_path / "data")
    assert "60, " in capsys.readouterr().out
    assert not (tmp_path / "data" / IMPORT_WORK_FOLDER).exists()
    assert {name: digest for name, digest in folder_hashes(tmp_path).items() if name in before} == before


def test_a_file_that_is_a_shard_already_is_not_copied(
    tmp_path: Path, documents: list[list[int]], run_import: Importer
) -> None:
    write_megatron(tmp_path / "a", [[[*one, END]] for one in documents])
    write_megatron(tmp_path / "b", [[one] for one in documents])
    run_import([tmp_path / "a.idx", tmp_path / "b.idx"], tmp_path / "linked")
    run_import([tmp_path / "a.idx", tmp_path / "b.idx"], tmp_path / "copied", link=False)

    token_file = tmp_path / "linked" / "shard-00000.tok"
    assert token_file.samefile(tmp_path / "a.bin") and not token_file.is_symlink()
    assert not (tmp_path / "copied" / "shard-00000.tok").samefile(tmp_path / "a.bin")
    assert folder_hashes(tmp_path / "linked") == folder_hashes(tmp_path / "copied")
    assert not (tmp_path / "linked" / "shard-00001.tok").samefile(tmp_path / "b.bin")
    with pytest.raises(UserError, match=r"'b' cannot be linked: its document 0 .* is not a content and one separator"):
        run_import([tmp_path / "a.idx", tmp_path / "b.idx"], tmp_path / "all", link=True)
    assert run_import(tmp_path / "a.idx", tmp_path / "all", link=True).linked == 1
    with pytest.raises(UserError, match="cannot be linked"):
        run_import(tmp_path / "a.idx", tmp_path / "split", link=True, validation_fraction=0.1)


def test_where_hard_links_are_refused_it_copies_or_on_request_links_symbolically(
    tmp_path: Path, documents: list[list[int]], run_import: Importer, monkeypatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    source = write_megatron(tmp_path / "a", [[[*one, END]] for one in documents])
    written = io.StringIO()
    assert run_import(source, tmp_path / "copied", console=Console(file=written)).linked == 0
    assert "the file system of the output cannot link to it" in written.getvalue()
    assert run_import(source, tmp_path / "linked", link=True).linked == 1
    assert (tmp_path / "linked" / "shard-00000.tok").readlink() == tmp_path / "a.bin"
    verify(tmp_path / "linked", console=quiet_console())
    assert read_token_documents(tmp_path / "linked") == read_token_documents(tmp_path / "copied") == documents


def test_large_vocabularies_take_the_four_bytes_of_int32_as_they_are(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])}
    backend = Tokenizer(models.WordLevel({**words, **{f"w{n}": n for n in range(5, 70_000)}}, unk_token="<unk>"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>", "pad_token": "<pad>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **special)
    fast.save_pretrained(str(tmp_path / "tokenizer"))
    contents = [[69_999, 3, 5], [65_536]]  # with an unknown token, which is content
    write_megatron(tmp_path / "a", [[[*one, END]] for one in contents], "<i4")
    write_megatron(tmp_path / "b", [[[*one, END]] for one in contents], "<i8")
    summary = import_tokens(
        [str(tmp_path / "*.idx")], str(tmp_path / "tokenizer"), str(tmp_path / "data"), console=quiet_console()
    )
    assert read_data_manifest(tmp_path / "data").dtype == "<u4"
    assert read_token_documents(tmp_path / "data") == contents * 2
    assert summary.linked == 1
    assert (tmp_path / "data" / "shard-00000.tok").samefile(tmp_path / "a.bin")


def test_a_folder_a_glob_and_prefixes_find_the_same_files_in_order(
    tmp_path: Path, documents: list[list[int]], run_import: Importer
) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    write_megatron(tmp_path / "in" / "a", [[one] for one in documents[:20]])
    write_megatron(tmp_path / "in" / "deep" / "b", [[one] for one in documents[20:]])
    (tmp_path / "in" / "readme.txt").write_text("about")
    for number, given in enumerate(
        [
            [tmp_path / "in"],
            [tmp_path / "in" / "**" / "*"],
            [tmp_path / "in" / "deep" / "b.bin", tmp_path / "in" / "a", tmp_path / "in" / "deep" / "b.idx"],
        ]
    ):
        run_import(given, tmp_path / str(number))
        assert read_token_documents(tmp_path / str(number)) == documents
    (source,) = read_data_manifest(tmp_path / "0").sources
    assert source["name"] == "in" and source["files"] == 2


def test_the_validation_split_is_chosen_by_the_ids(
    tmp_path: Path, documents: list[list[int]], run_import: Importer
) -> None:
    write_megatron(tmp_path / "a", [[[*one, END]] for one in [*documents, *documents[:30]]])
    write_datatrove(tmp_path / "b.ds", [[BEGIN, *one, END] for one in reversed(documents)], token_size=4)
    run_import(tmp_path / "a", tmp_path / "from-a", validation_fraction=0.3)
    run_import(tmp_path / "b.ds", tmp_path / "from-b", validation_fraction=0.3)
    sides = {
        (run, split): {tuple(ids) for ids in read_token_documents(tmp_path / run / split)}
        for run in ("from-a", "from-b")
        for split in ("train", "validation")
    }
    assert sides["from-a", "train"] == sides["from-b", "train"]
    assert sides["from-a", "validation"] == sides["from-b", "validation"]
    assert not sides["from-a", "train"] & sides["from-a", "validation"]
    assert 8 <= len(sides["from-a", "validation"]) <= 30
    assert read_data_manifest(tmp_path / "from-a" / "train").documents > len(sides["from-a", "train"])
    verify(tmp_path / "from-a", console=quiet_console())
    with pytest.raises(UserError, match="Of 60 documents none falls into the validation split"):
        run_import(tmp_path / "b.ds", tmp_path / "none", validation_fraction=1e-9)


def test_documents_with_a_special_token_inside_can_be_left_out(
    tmp_path: Path, documents: list[list[int]], run_import: Importer
) -> None:
    bad = [*documents[3][:5], END, *documents[3][5:], END]
    source = write_megatron(tmp_path / "a", [[[*one, END]] for one in documents[:3]] + [[bad], [[*documents[4], END]]])
    with pytest.raises(
        UserError, match=r"Document 3 of 'a' \(counted from 0\) holds the special token '</s>' \(id 2\)"
    ):
        run_import(source, tmp_path / "data")
    summary = run_import(source, tmp_path / "data", special_inside="skip")
    assert read_token_documents(tmp_path / "data") == [*documents[:3], documents[4]]
    assert summary.counts.skipped == 1 and summary.linked == 0
    assert read_data_manifest(tmp_path / "data").statistics["skipped_documents_in_input"] == 1


def test_a_token_that_ends_every_document_is_named_and_stripped_on_request(
    tmp_path: Path, documents: list[list[int]], run_import: Importer, tokenizer: Path
) -> None:
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    newline = loaded.get_vocab()["Ċ"]
    contents = [one[:number] for one in documents for number in (5, 9, 13)]
    source = write_datatrove(tmp_path / "a.ds", [[newline, *one, newline, END] for one in contents])
    written = io.StringIO()
    run_import(source, tmp_path / "kept", console=Console(file=written, width=400))
    assert f"Every document begins with 'Ċ' (id {newline})" in written.getvalue()
    assert f"Every document ends with 'Ċ' (id {newline})" in written.getvalue()
    assert read_token_documents(tmp_path / "kept")[0] == [newline, *contents[0], newline]
    written = io.StringIO()
    run_import(source, tmp_path / "stripped", strip=["Ċ"], console=Console(file=written, width=400))
    assert read_token_documents(tmp_path / "stripped") == contents
    assert f"{2 * len(contents)} Ċ" in written.getvalue() and "Every document ends" not in written.getvalue()


def test_what_looks_wrong_is_said(tmp_path: Path, run_import: Importer, documents: list[list[int]]) -> None:
    stream = [token for one in documents for token in one]
    blocks = [stream[start : start + 16] for start in range(0, 120 * 16, 16)]
    written = io.StringIO()
    run_import(write_dataset(tmp_path / "a", blocks), tmp_path / "data", console=Console(file=written, width=400))
    assert "120 of 120 documents have 16 tokens, and none more: they look like blocks" in written.getvalue()
    assert "The first document begins: " in written.getvalue()
    halves = [*([*one, END] for one in documents), documents[0]]
    written = io.StringIO()
    write_datatrove(tmp_path / "b.ds", halves)
    (tmp_path / "b.ds.loss").write_bytes(b"\1")
    run_import(tmp_path / "b.ds", tmp_path / "cut", console=Console(file=written, width=400))
    for words in ("1 of 61 documents end with no special token", "its .loss mask is left out", "tokenized with 'gpt2'"):
        assert words in written.getvalue()
    written = io.StringIO()
    write_megatron(tmp_path / "c", [in_halves(one) for one in documents])
    run_import(tmp_path / "c", tmp_path / "joined", console=Console(file=written, width=400))
    assert "Joined the sequences of 60 documents" in written.getvalue()


def test_the_command_imports_several_files_and_ends_with_the_right_code(
    tmp_path: Path, documents: list[list[int]], tokenizer: Path
) -> None:
    first = write_megatron(tmp_path / "a", [[[*one, END]] for one in documents[:30]])
    second = write_megatron(tmp_path / "b", [[one] for one in documents[30:]])
    given = ("data", "import", "--input", first, second, "--tokenizer", tokenizer)
    result = maskwright(*given, "--output", tmp_path / "data", "--from", "megatron", "--strip", "Ċ")
    assert result.returncode == EXIT_FINISHED, result.stderr
    assert "60 documents" in result.stderr and "2 shard(s), 1 of them linked" in result.stderr
    assert read_token_documents(tmp_path / "data") == documents
    refused = maskwright(*given, "--output", tmp_path / "all", "--link")
    assert_one_card(refused, EXIT_USER_MISTAKE, "'b' cannot be linked: its document 0", "Leave --link out")
    os.truncate(tmp_path / "b.bin", 100)
    words = ("Cannot import 'b.bin': it has 100 bytes", str(tmp_path / "b.bin"), "Copy the token file and its index")
    assert_one_card(maskwright(*given, "--output", tmp_path / "cut"), EXIT_DAMAGED, *words)
