"""What marking word and sentence starts adds to tokenizing, in one process.

    python -m tools.compare_starts --input TEXT... --tokenizer DIR [--documents line] [--rounds 5]

Each round encodes the same documents once for each variant, in the batches that `prepare` makes. Printed: characters a
second of processor time (the median of the rounds), and the time as a multiple of that without marks.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tools.prepare.encode import BATCH_CHARACTERS, BATCH_DOCUMENTS, Encoder
from tools.prepare.inputs import find_inputs, resolve_documents
from tools.prepare.pieces import TextSettings
from tools.prepare.plan import plan_units
from tools.prepare.readers import read_documents
from tools.prepare.segment import StartSettings
from trainer.data.manifest import token_dtype
from trainer.data.tokenizer import load_tokenizer, read_vocabulary

VARIANTS = {
    "no marks": StartSettings(),
    "words: tokenizer": StartSettings(words="tokenizer"),
    "words: jieba": StartSettings(words="jieba"),
    "sentences: rules": StartSettings(sentences="rules"),
    "sentences: lines": StartSettings(sentences="lines"),
    "words: tokenizer, sentences: rules": StartSettings(words="tokenizer", sentences="rules"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, metavar="TEXT")
    parser.add_argument("--tokenizer", required=True, metavar="DIR")
    parser.add_argument("--documents", choices=("file", "paragraph", "line", "row"))
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    batches = list(_batches(arguments.input, arguments.documents))
    characters = sum(len(text) for batch in batches for text in batch)
    tokenizer = load_tokenizer(arguments.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        file, dtype = (
            str(Path(folder) / "tokenizer.json"),
            token_dtype(read_vocabulary(tokenizer, arguments.tokenizer).size),
        )
        encoders = {name: Encoder(file, dtype, starts.segmenters()) for name, starts in VARIANTS.items()}
    for encoder in encoders.values():
        encoder.encode(batches[0][:1])  # jieba reads its dictionary
    seconds: dict[str, list[float]] = {name: [] for name in encoders}
    for _ in range(arguments.rounds):
        for name, encoder in encoders.items():
            started = time.process_time()
            for batch in batches:
                encoder.encode(batch)
            seconds[name].append(time.process_time() - started)
    print(f"{characters:,} characters, {arguments.rounds} rounds, load average {os.getloadavg()[0]:.2f}")
    for name, own in seconds.items():
        ratio = np.array(own) / np.array(seconds["no marks"])
        speed = characters / statistics.median(own) / 1e6
        print(
            f"{name:36} {speed:6.2f} M characters/s  {np.median(ratio):5.2f} × ({ratio.min():.2f} to {ratio.max():.2f})"
        )


def _batches(paths: list[str], documents: str | None) -> Iterator[list[str]]:
    found = find_inputs(paths)
    documents = resolve_documents(documents, found.format)
    batch: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        reading = TextSettings(found.format, documents, "text", scratch)
        for piece in (piece for unit in plan_units(found, documents) for piece in unit.pieces):
            for text, _ in read_documents(piece, reading):
                batch.append(text)
                if len(batch) >= BATCH_DOCUMENTS or sum(map(len, batch)) >= BATCH_CHARACTERS:
                    yield batch
                    batch = []
    if batch:
        yield batch


if __name__ == "__main__":
    main()
