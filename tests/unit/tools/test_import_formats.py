"""Reading foreign layouts: every way of cutting gives the same documents, and what does not fit is named."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tests.preparing import quiet_console
from tests.token_files import write_dataset, write_datatrove, write_megatron
from tools.import_tokens import import_tokens
from tools.import_tokens.clean import Cleaner
from tools.import_tokens.find import find_sources
from trainer.data.tokenizer import read_vocabulary
from trainer.errors import DamagedError, MaskwrightError, UserError

BEGIN, PAD, END, UNKNOWN, MASK = range(5)
AROUND = (BEGIN, PAD, END)

ids = st.lists(st.sampled_from([BEGIN, PAD, END, UNKNOWN, MASK, 5, 6, 399]), max_size=6)
megatron_documents = st.lists(st.lists(ids, max_size=3), min_size=1, max_size=8)


def content_of(sequence: list[int]) -> list[int]:
    """What is between the special tokens at both ends; the definition, one token at a time."""
    start, stop = 0, len(sequence)
    while start < stop and sequence[start] in AROUND:
        start += 1
    while stop > start and sequence[stop - 1] in AROUND:
        stop -= 1
    return sequence[start:stop]


def is_a_shards(stored: list[int]) -> bool:
    """Whether a stored document is a content and one separator."""
    content = content_of(stored)
    return bool(content) and stored == [*content, END] and not {*AROUND, MASK} & {*content}


def joined(sequences: list[list[int]]) -> list[int]:
    return [token for sequence in sequences for token in sequence]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    documents=megatron_documents,
    dtype=st.sampled_from(["<u2", "<i4", "<i8"]),
    chunk=st.integers(1, 12),
    window=st.integers(1, 5),
    shard=st.integers(1, 20),
)
def test_documents_are_the_same_however_they_are_cut(
    documents: list[list[list[int]]],
    dtype: str,
    chunk: int,
    window: int,
    shard: int,
    tokenizer: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = write_megatron(tmp_path_factory.mktemp("files") / "a", documents, dtype)
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    cleaner = Cleaner(loaded, read_vocabulary(loaded, "here"), skip_special=True)
    expected, empty, skipped = [], 0, 0
    for document in documents:
        contents = [content_of(sequence) for sequence in document]
        if any(token in (*AROUND, MASK) for content in contents for token in content):
            skipped += 1
        elif any(contents):
            expected.append(joined(contents))
        else:
            empty += 1

    found, counted = [], [0, 0, 0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tools.import_tokens.source.CHUNK_TOKENS", chunk)
        patch.setattr("tools.import_tokens.source._WINDOW_DOCUMENTS", window)
        (source,) = find_sources([str(path)]).sources
        ranges = source.cut(shard)
        assert [first for first, _ in ranges] + [source.documents] == [0, *(last for _, last in ranges)]
        for part in (piece for first, last in ranges for piece in source.chunks(first, last)):
            assert len(part.tokens) <= chunk or len(part.document_ends) == 1
            cleaned = cleaner.clean(part, source)
            found += (
                [piece.tolist() for piece in np.split(cleaned.tokens, cleaned.ends[:-1])] if len(cleaned.ends) else []
            )
            counts = cleaned.counts
            counted = [a + b for a, b in zip(counted, (counts.documents, counts.empty, counts.skipped), strict=True)]
            stored = [joined(one) for one in documents[part.first : part.first + len(part.document_ends)]]
            differs = [not is_a_shards(one) for one in stored]
            assert cleaned.differs == (part.first + differs.index(True) if any(differs) else None)
    assert found == expected
    assert counted == [len(expected), empty, skipped]


@pytest.mark.parametrize("rows_a_chunk", [1, 3, 1000])
def test_rows_of_a_data_set_folder_are_documents(rows_a_chunk: int, tmp_path: Path, monkeypatch) -> None:
    rows = [[5, 6], [], [7], [8, 9, 10], [11]]
    write_dataset(tmp_path / "set", rows, shards=2)
    monkeypatch.setattr("tools.import_tokens.dataset_folder.ROWS_A_CHUNK", rows_a_chunk)
    (source,) = find_sources([str(tmp_path / "set")]).sources
    assert source.documents == 5
    for limit in (1, 10, 1 << 28):
        ranges = source.cut(limit)
        chunks = [chunk for first, last in ranges for chunk in source.chunks(first, last)]
        pieces = [piece.tolist() for chunk in chunks for piece in np.split(chunk.tokens, chunk.sequence_ends[:-1])]
        assert pieces == rows
        assert chunks[0].first == 0
    assert len(source.cut(1)) == 5


@pytest.mark.parametrize("kind", ["large_list", "fixed_size_list"])
def test_other_arrow_lists_are_read_as_well(kind: str, tmp_path: Path) -> None:
    import datasets

    rows = [[5, 6, 7], [8, 9, 10]]
    feature = (
        datasets.LargeList(datasets.Value("uint16"))
        if kind == "large_list"
        else datasets.List(datasets.Value("int64"), length=3)
    )
    features = datasets.Features({"ids": feature})
    datasets.Dataset.from_dict({"ids": rows}, features=features).save_to_disk(str(tmp_path / "set"))
    (source,) = find_sources([str(tmp_path / "set")], field="ids").sources
    (chunk,) = source.chunks(0, 2)
    assert chunk.tokens.tolist() == [5, 6, 7, 8, 9, 10] and chunk.sequence_ends.tolist() == [3, 6]


def patch_bytes(path: Path, offset: int, content: bytes) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset : offset + len(content)] = content
    path.write_bytes(raw)


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 2)


DOCUMENTS = [[[5, 6, END]], [[7, END]], [[8, 9], [10, END]]]
LENGTHS, POINTERS, INDEX = 34, 34 + 4 * 4, 34 + 4 * 4 + 4 * 8  # of the index of DOCUMENTS, 4 sequences


@pytest.mark.parametrize(
    ("damage", "kind", "problem"),
    [
        (lambda folder: (folder / "a.bin").unlink(), UserError, "There is no 'a.bin' beside 'a.idx'"),
        (lambda folder: (folder / "a.idx").unlink(), UserError, "There is no 'a.idx' beside 'a.bin'"),
        (lambda folder: cut_short(folder / "a.bin"), DamagedError, "'a.bin': it has 16 bytes; its index says 18"),
        (lambda folder: cut_short(folder / "a.idx"), DamagedError, "its header says 4 sequences and 3 documents"),
        (lambda folder: os.truncate(folder / "a.idx", 20), DamagedError, "it ends within its header"),
        (lambda folder: patch_bytes(folder / "a.idx", 0, b"XX"), UserError, "does not begin with MMIDIDX"),
        (lambda folder: (folder / "a.idx").write_bytes(b"TNTIDX\0\0" + b"\0" * 40), UserError, "old format"),
        (lambda folder: patch_bytes(folder / "a.idx", 9, b"\2"), UserError, "of version 2, only 1 is known"),
        (lambda folder: patch_bytes(folder / "a.idx", 17, b"\7"), UserError, "type 7 of its tokens"),
        (lambda folder: patch_bytes(folder / "a.idx", 17, b"\4"), DamagedError, "do not follow each other"),
        (lambda folder: patch_bytes(folder / "a.idx", POINTERS + 8, b"\x08"), DamagedError, "do not follow each other"),
        (lambda folder: patch_bytes(folder / "a.idx", INDEX + 8, b"\x03"), DamagedError, "are not in order"),
        (lambda folder: patch_bytes(folder / "a.idx", INDEX + 24, b"\x03"), DamagedError, "sequences 0 to 3 of 4"),
        (
            lambda folder: (folder / "a.idx").write_bytes((folder / "a.idx").read_bytes() + b"\0" * 4),
            UserError,
            "multimodal",
        ),
    ],
)
def test_a_megatron_index_that_does_not_fit_is_refused(
    damage: Callable[[Path], None], kind: type[MaskwrightError], problem: str, tmp_path: Path
) -> None:
    write_megatron(tmp_path / "a", DOCUMENTS)
    assert find_sources([str(tmp_path)]).sources[0].documents == 3
    damage(tmp_path)
    with pytest.raises(kind) as caught:
        find_sources([str(tmp_path)])
    assert problem in caught.value.problem and caught.value.where and caught.value.remedy


@pytest.mark.parametrize(
    ("damage", "kind", "problem"),
    [
        (lambda folder: (folder / "a.ds.index").unlink(), UserError, "not known where its documents end"),
        (lambda folder: cut_short(folder / "a.ds.index"), DamagedError, "22 bytes are not numbers of 8 bytes"),
        (
            lambda folder: cut_short(folder / "a.ds"),
            DamagedError,
            "it has 16 bytes; its index says 9 tokens of 2 bytes",
        ),
        (lambda folder: os.truncate(folder / "a.ds.index", 16), DamagedError, "18 bytes; its index says 5 tokens"),
        (
            lambda folder: (folder / "a.ds.index").write_bytes(struct.pack("<3Q", 5, 3, 9)),
            DamagedError,
            "ends are not in order",
        ),
        (lambda folder: (folder / "a.ds.metadata").write_text("gpt2|4\n9"), DamagedError, "9 tokens of 4 bytes"),
        (lambda folder: (folder / "a.ds.metadata").write_text("gpt2|3\n9"), UserError, "says '3' bytes a token"),
    ],
)
def test_a_datatrove_index_that_does_not_fit_is_refused(
    damage: Callable[[Path], None], kind: type[MaskwrightError], problem: str, tmp_path: Path
) -> None:
    write_datatrove(tmp_path / "a.ds", [[5, 6, END], [7, END], [8, 9, 10, END]])
    assert find_sources([str(tmp_path)]).sources[0].documents == 3
    damage(tmp_path)
    with pytest.raises(kind) as caught:
        find_sources([str(tmp_path)])
    assert problem in caught.value.problem and caught.value.where and caught.value.remedy


def test_metadata_of_older_versions_names_the_tokenizer_alone(tmp_path: Path) -> None:
    write_datatrove(tmp_path / "a.ds", [[5, END]])
    (tmp_path / "a.ds.metadata").write_text("gpt2\n2\n2 T")
    (source,) = find_sources([str(tmp_path)]).sources
    assert source.tokenizer_name == "gpt2" and source.documents == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("make", "options", "problem"),
    [
        (lambda folder: write_megatron(folder / "a", [[[5]], [[6, 400]]], "<i4"), {}, "Document 1 of 'a'"),
        (
            lambda folder: write_megatron(folder / "a", [[[5]], [[6, 400]]], "<i4"),
            {},
            "holds id 400; the tokenizer has",
        ),
        (lambda folder: write_dataset(folder / "a", [[5], [], [6, -100, 7]]), {}, "Document 2 of 'a'"),
        (lambda folder: write_dataset(folder / "a", [[5], [], [6, -100, 7]]), {}, "holds id -100"),
        (lambda folder: write_megatron(folder / "a", [[[5]], [[6, MASK]]]), {}, "special token '<mask>' (id 4) inside"),
        (lambda folder: write_megatron(folder / "a", [[[5, END], [END, 6, END, 6]]]), {}, "Document 0 of 'a'"),
        (lambda folder: write_megatron(folder / "a", [[[END]], []]), {}, "no documents to import: 2 are empty"),
        (lambda folder: write_megatron(folder / "a", []), {}, "no documents to import: 0 are empty"),
        (lambda folder: write_megatron(folder / "a", [[[5]]]), {"strip": ["<eod>"]}, "has no token '<eod>'"),
        (
            lambda folder: write_megatron(folder / "a", [[[5]]]),
            {"format": "datatrove"},
            "not a file that can be imported",
        ),
        (lambda folder: write_megatron(folder / "a", [[[5]]]), {"format": "megatrom"}, "Did you mean 'megatron'?"),
        (lambda folder: write_dataset(folder / "a", [[5]]), {"field": "input_id"}, "Did you mean 'input_ids'?"),
        (lambda folder: write_dataset(folder / "a", [[5]]).parent / "b", {}, "There is no"),
        (lambda folder: folder, {}, "holds nothing to import; it holds nothing"),
        (lambda folder: folder / "*.ds", {}, "matches no file"),
    ],
)
def test_mistakes_in_the_input_are_named(
    make: Callable[[Path], Path], options: dict, problem: str, tmp_path: Path, tokenizer: Path
) -> None:
    (tmp_path / "in").mkdir()
    given = str(make(tmp_path / "in"))
    with pytest.raises(UserError) as caught:
        import_tokens([given], str(tokenizer), str(tmp_path / "data"), console=quiet_console(), **options)
    assert problem in caught.value.problem
    assert caught.value.where and caught.value.remedy
    assert not (tmp_path / "data" / "manifest.json").exists()


def test_a_data_set_folder_says_what_is_wrong_with_it(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"input_ids": [[5], None], "text": ["a", "b"]})
    datasets.DatasetDict(train=rows, other=rows).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(UserError, match="'splits' holds several splits: other, train") as caught:
        find_sources([str(tmp_path / "splits")])
    assert str(tmp_path / "splits" / "train") in caught.value.remedy
    with pytest.raises(UserError, match="Column 'text' holds string, not lists of ids"):
        find_sources([str(tmp_path / "splits" / "train")], field="text")
    (source,) = find_sources([str(tmp_path / "splits" / "train")]).sources
    with pytest.raises(UserError, match="Rows 0 to 1 of 'train' hold a null"):
        list(source.chunks(0, 2))
    next((tmp_path / "splits" / "train").glob("*.arrow")).write_bytes(b"nothing")
    with pytest.raises(UserError, match="Cannot open the data set folder 'train'"):
        find_sources([str(tmp_path / "splits" / "train")])


def test_formats_are_not_mixed_and_one_can_be_picked(tmp_path: Path) -> None:
    write_megatron(tmp_path / "a", [[[5]]])
    write_datatrove(tmp_path / "b.ds", [[5]])
    write_dataset(tmp_path / "c", [[5]])
    with pytest.raises(UserError, match="mixes formats: 1 datasets, 1 datatrove, 1 megatron"):
        find_sources([str(tmp_path)])
    for format in ("datasets", "datatrove", "megatron"):
        assert [source.format for source in find_sources([str(tmp_path)], format).sources] == [format]


def test_the_tokenizer_that_datatrove_names_is_compared(tmp_path: Path, tokenizer: Path) -> None:
    from tokenizers import Tokenizer

    own = tokenizer / "tokenizer.json"
    other = Tokenizer.from_file(str(own))
    other.add_tokens(["extra"])
    other.save(str(tmp_path / "other.json"))
    write_datatrove(tmp_path / "a.ds", [[5, END]], tokenizer_name=str(tmp_path / "other.json"))
    with pytest.raises(UserError, match="whose vocabulary is not that of"):
        import_tokens([str(tmp_path)], str(tokenizer), str(tmp_path / "data"), console=quiet_console())
    assert not (tmp_path / "data").exists()
    write_datatrove(tmp_path / "b.ds", [[5, END]], tokenizer_name=str(own))
    with pytest.raises(UserError, match="tokenized with different tokenizers"):
        import_tokens([str(tmp_path / "*.ds")], str(tokenizer), str(tmp_path / "data"), console=quiet_console())
    summary = import_tokens([str(tmp_path / "b.ds")], str(tokenizer), str(tmp_path / "data"), console=quiet_console())
    assert summary.documents == 1
