"""The loaders that `bench loader` puts beside ours: Hugging Face's, and mosaicml-streaming where it is installed.

Hugging Face's collator is used as its run_mlm.py and documentation have it: blocks packed to seq_len in an Arrow data
set with `special_tokens_mask` (the collator's own advice "for best performance"), drawn in random order by a
DataLoader. Once with rows as they come, once with rows as tensors (`with_format("torch")`); and once past the
collator's call, with its masking alone on whole batches of tensors, which is the fastest that its parts can do.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from tools.bench.common import Ratio, Variant, for_seconds
from trainer.config import ObjectiveConfig
from trainer.data.manifest import WORD_STARTS
from trainer.errors import UserError

if TYPE_CHECKING:
    from tools.bench.loader_work import Workload
    from trainer.objectives.framing import Framed

ARROW_BLOCKS = 16_384  # the blocks that the other loaders get: a small part, so that theirs are cached as well as ours
((_, MASK_RATIO),) = ObjectiveConfig().mask_ratios


def peer_variants(workload: Workload, against: str, console: Console) -> tuple[list[Variant], list[Ratio], list[str]]:
    """Make the variants of others, the ratios to print, and notes.

    Args:
        against: "all", "hf", "mds" or "none".

    Raises:
        UserError: for "mds" when mosaicml-streaming is not installed.
    """
    variants: list[Variant] = []
    ratios: list[Ratio] = []
    notes: list[str] = []
    if workload.reads_words and against in ("all", "mds"):
        lacking = "mosaicml-streaming has no masks of its own, and is measured with single tokens only."
        if against == "mds":
            raise UserError(lacking, where="--against mds", remedy="Leave out --against mds, or --scheme.")
        against, notes = "hf", [f"{lacking} It is left out."]
    if against in ("all", "hf"):
        variants += _hugging_face(workload, console)
        ratios += [Ratio("end to end", name) for name in ("hf rows", "hf tensor rows", "hf whole tensors")]
        ratios.append(Ratio("masks", "hf masks"))
    if against in ("all", "mds"):
        lacking = _mosaic_lacking()
        if lacking and against == "mds":
            raise UserError(
                lacking, where="--against mds", remedy="docs/performance.md says how to install it; or leave it out."
            )
        if lacking:
            notes.append(f"{lacking} It is left out.")
        else:
            variants += _mosaic(workload, console)
            ratios += [Ratio("gather", "mds blocks"), Ratio("end to end", "mds with hf collator")]
    if variants:
        notes.append(
            f"the others read {_blocks_for_others(workload):,} of the same blocks, from the page cache as well"
        )
    return variants, ratios, notes


def _mosaic_lacking() -> str:
    """Say why mosaicml-streaming cannot be measured; return an empty text when it can."""
    try:
        version("mosaicml-streaming")
        import_module("streaming")
    except PackageNotFoundError:
        return "mosaicml-streaming is not installed."
    except Exception as error:  # it imports much that it does not need here, and whatever that raises
        return f"mosaicml-streaming is installed but cannot be imported ({type(error).__name__}: {error})."
    return ""


def _blocks_for_others(workload: Workload) -> int:
    return min(ARROW_BLOCKS, workload.shards.block_count(workload.objective.view.payload))


def _framed_blocks(workload: Workload) -> Framed:
    return workload.read(np.arange(_blocks_for_others(workload)))


def _offsets_of_words(starts: np.ndarray) -> np.ndarray:
    """Make the offsets by which the collator finds words, int32 [n, S, 2]: a gap before each, none within one."""
    ends = np.cumsum(1 + starts, axis=1, dtype=np.int32)
    return np.stack([ends - 1, ends], axis=-1)


def _special_tokens_mask(workload: Workload, tokens: np.ndarray) -> np.ndarray:
    return np.isin(tokens, workload.objective.vocabulary.special_ids).astype(np.int8)


def _hugging_face(workload: Workload, console: Console) -> list[Variant]:
    import torch
    from transformers import DataCollatorForLanguageModeling

    rows = _arrow_data_set(workload, console)
    collator = DataCollatorForLanguageModeling(
        workload.tokenizer, mlm_probability=MASK_RATIO, whole_word_mask=workload.reads_words
    )
    tensors = rows.with_format("torch")
    ready = tensors[: workload.plan.micro_size]

    def masked(read: Any) -> tuple[Any, Any]:
        return collator.torch_mask_tokens(
            read["input_ids"], read["special_tokens_mask"], offset_mapping=read.get("offset_mapping")
        )

    def masks() -> int:
        return masked({**ready, "input_ids": ready["input_ids"].clone()})[0].numel()

    def whole_tensors() -> int:
        inputs, labels = masked(tensors[next(indices)])
        if torch.cuda.is_available():
            inputs, labels = inputs.pin_memory(), labels.pin_memory()
        return inputs.numel()

    indices = _shuffled(len(rows), workload.plan.micro_size)
    parts: list[tuple[str, str, Callable[[], int]]] = [
        ("hf masks", "the collator's torch_mask_tokens on a batch that is there", masks),
        ("hf rows", "DataLoader over Arrow rows, DataCollatorForLanguageModeling", _loader(workload, rows, collator)),
        ("hf tensor rows", 'the same rows with_format("torch")', _loader(workload, tensors, collator)),
        ("hf whole tensors", "batches of tensors from Arrow, torch_mask_tokens alone, no collator", whole_tensors),
    ]
    return [Variant(name, what, for_seconds(workload.seconds, step)) for name, what, step in parts]


def _arrow_data_set(workload: Workload, console: Console) -> Any:
    """Write the blocks as `group_texts` leaves them (int32 ids, two int8 masks), and memory-map them from disk.

    The offsets of the tokens stand beside them where whole words are masked.
    """
    import datasets
    import pyarrow as pa
    from datasets.table import InMemoryTable

    framed = _framed_blocks(workload)
    tokens = framed.tokens.astype(np.int32)
    console.print(f"Writing {len(tokens):,} blocks to an Arrow data set")
    columns = {
        "input_ids": tokens,
        "attention_mask": np.ones(tokens.shape, np.int8),
        "special_tokens_mask": _special_tokens_mask(workload, tokens),
    }
    offsets = pa.array(np.arange(len(tokens) + 1, dtype=np.int32) * workload.plan.seq_len)
    lists = {name: pa.ListArray.from_arrays(offsets, pa.array(rows.ravel())) for name, rows in columns.items()}
    if workload.reads_words:
        pairs = _offsets_of_words(framed.starts[WORD_STARTS])
        flat = pa.FixedSizeListArray.from_arrays(pa.array(pairs.ravel()), 2)
        lists["offset_mapping"] = pa.ListArray.from_arrays(offsets, flat)
    datasets.disable_progress_bars()
    folder = str(workload.scratch / "arrow")
    datasets.Dataset(InMemoryTable(pa.table(lists))).save_to_disk(folder)
    return datasets.load_from_disk(folder)


def _loader(workload: Workload, rows: Any, collator: Callable[[Any], Any]) -> Callable[[], int]:
    import torch
    from torch.utils.data import DataLoader

    loader = DataLoader(
        rows,
        batch_size=workload.plan.micro_size,
        shuffle=True,
        drop_last=True,
        collate_fn=collator,
        pin_memory=torch.cuda.is_available(),
    )
    batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def step() -> int:
        return next(batches)["input_ids"].numel()

    return step


def _shuffled(count: int, size: int) -> Iterator[list[int]]:
    generator = np.random.default_rng(0)
    while True:
        yield generator.integers(0, count, size).tolist()


def _mosaic(workload: Workload, console: Console) -> list[Variant]:
    """Write MDS shards of the same blocks, and make variants that read them by StreamingDataset in this process."""
    import torch
    from transformers import DataCollatorForLanguageModeling

    rows = _mds_data_set(workload, console)
    collator = DataCollatorForLanguageModeling(workload.tokenizer, mlm_probability=MASK_RATIO)
    indices = _shuffled(_blocks_for_others(workload), workload.plan.micro_size)

    def read() -> list[dict[str, np.ndarray]]:
        return [rows[index] for index in next(indices)]

    def blocks() -> int:
        return torch.from_numpy(np.stack([row["input_ids"] for row in read()])).numel()

    def masked() -> int:
        return collator(read())["input_ids"].numel()

    parts: list[tuple[str, str, Callable[[], int]]] = [
        ("mds blocks", "mosaicml-streaming: samples by number, in random order, stacked to batches", blocks),
        ("mds with hf collator", "the same samples through DataCollatorForLanguageModeling", masked),
    ]
    return [Variant(name, what, for_seconds(workload.seconds, step)) for name, what, step in parts]


def _mds_data_set(workload: Workload, console: Console) -> Any:
    from streaming import MDSWriter, StreamingDataset  # type: ignore[import-not-found]  # not a dependency

    tokens = _framed_blocks(workload).tokens
    masks = _special_tokens_mask(workload, tokens)
    dtype, length = workload.shards.dtype.name, workload.plan.seq_len
    columns = {"input_ids": f"ndarray:{dtype}:{length}", "special_tokens_mask": f"ndarray:int8:{length}"}
    console.print(f"Writing {len(tokens):,} blocks to MDS shards")
    folder = str(workload.scratch / "mds")
    with MDSWriter(out=folder, columns=columns) as writer:
        for ids, mask in zip(tokens.astype(dtype), masks, strict=True):
            writer.write({"input_ids": ids, "special_tokens_mask": mask})
    return StreamingDataset(local=folder, batch_size=workload.plan.micro_size)
