"""Token files as other tools write them, byte by byte from the definitions of their formats."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

MEGATRON_TYPES = {"<u1": 1, "<i1": 2, "<i2": 3, "<i4": 4, "<i8": 5, "<f8": 6, "<f4": 7, "<u2": 8}


def write_megatron(prefix: Path, documents: Sequence[Sequence[Sequence[int]]], dtype: str = "<u2") -> Path:
    """`prefix.bin` and `prefix.idx` of documents of sequences of ids, as IndexedDatasetBuilder writes them."""
    sequences = [sequence for document in documents for sequence in document]
    lengths = [len(sequence) for sequence in sequences]
    width = np.dtype(dtype).itemsize
    pointers = [sum(lengths[:number]) * width for number in range(len(lengths))]
    index, total = [0], 0
    for document in documents:
        total += len(document)
        index.append(total)
    prefix.with_name(prefix.name + ".bin").write_bytes(
        b"".join(np.array(sequence, dtype).tobytes() for sequence in sequences)
    )
    prefix.with_name(prefix.name + ".idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<Q", 1)
        + struct.pack("<B", MEGATRON_TYPES[dtype])
        + struct.pack("<Q", len(lengths))
        + struct.pack("<Q", len(index))
        + struct.pack(f"<{len(lengths)}i", *lengths)
        + struct.pack(f"<{len(pointers)}q", *pointers)
        + struct.pack(f"<{len(index)}q", *index)
    )
    return prefix.with_name(prefix.name + ".idx")


def write_datatrove(
    path: Path, documents: Sequence[Sequence[int]], token_size: int = 2, tokenizer_name: str | None = "gpt2"
) -> Path:
    """`path` (X.ds), its index and, unless the name is None, its metadata, as DocumentTokenizer writes them."""
    ends = [sum(map(len, documents[: number + 1])) for number in range(len(documents))]
    letter = {2: "H", 4: "I"}[token_size]
    path.write_bytes(b"".join(struct.pack(f"<{len(ids)}{letter}", *ids) for ids in documents))
    path.with_name(path.name + ".index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
    if tokenizer_name is not None:
        lines = [f"{tokenizer_name}|{token_size}", str(ends[-1] if ends else 0), "1 kT"]
        path.with_name(path.name + ".metadata").write_text("\n".join(lines))
    return path


def write_dataset(folder: Path, rows: Sequence[Sequence[int]], column: str = "input_ids", shards: int = 1) -> Path:
    """A folder of `Dataset.save_to_disk` with a column of ids and one of attention masks."""
    import datasets

    columns = {column: [list(row) for row in rows], "attention_mask": [[1] * len(row) for row in rows]}
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(columns).save_to_disk(str(folder), num_shards=shards)
    return folder
