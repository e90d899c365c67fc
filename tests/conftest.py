from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if os.environ.get("MASKWRIGHT_GPU_TESTS") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is tested is the CPU's: exact, and with any number of ranks
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported, and its kernels when they are made
    os.environ["TORCH_WARM_POOL"] = "0"  # processes that compile for Triton alone, which a CPU has no use for

import gc
import random
import signal
from pathlib import Path

import hypothesis
import pytest
from filelock import FileLock

gc.disable()  # until all is imported: those million objects stay, and to look through them takes half of the collection

hypothesis.settings.register_profile("no deadline", deadline=None)  # a timing in a test is noise
hypothesis.settings.register_profile("fast", deadline=None, max_examples=20)
hypothesis.settings.load_profile("no deadline")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A background job of a shell ignores Ctrl-C, and so would each process that a test interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)


MARK_OF_FOLDER = {
    "distributed": "ranks",
    "e2e": "process",
    "fuzz": "process",
    "gpu": "gpu",
    "models": "models",
    "process": "process",
    "slurm": "slurm",
}
"""What the tests of a folder need; those of tests/unit need none of it."""


def pytest_itemcollected(item: pytest.Item) -> None:
    mark = MARK_OF_FOLDER.get(item.path.relative_to(Path(__file__).parent).parts[0])
    if mark is not None:
        item.add_marker(mark)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests on SLURM: they wait more than they compute, and the last file of a run is run alone."""
    items.sort(key=lambda item: item.path.parent.name != "slurm")


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def write_text(path: Path, documents: int, seed: int) -> Path:
    """English-like text: sentences of words with a Zipf-like frequency, one paragraph a document."""
    generator = random.Random(seed)
    syllables = ["ka", "lo", "mi", "ne", "ru", "sa", "ti", "vo", "an", "el", "or", "us"]
    words = ["".join(generator.choices(syllables, k=generator.randint(1, 3))) for _ in range(400)]
    weights = [1 / (rank + 1) for rank in range(len(words))]
    paragraphs = []
    for _ in range(documents):
        sentences = [" ".join(generator.choices(words, weights, k=generator.randint(4, 14))) + "." for _ in range(4)]
        paragraphs.append(" ".join(sentences))
    path.write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")
    return path


def make_workspace(folder: Path) -> None:
    """Write text.txt, a tokenizer and prepared data (train and validation) into a folder, with the real tools."""
    from launcher.console import make_console
    from tools.prepare import prepare
    from tools.tokenizer import train_tokenizer

    text = write_text(folder / "text.txt", documents=700, seed=1)
    console = make_console()
    train_tokenizer([str(text)], str(folder / "tokenizer"), "bytelevel-bpe", 500, console)
    prepare(
        [str(text)],
        str(folder / "tokenizer"),
        str(folder / "data"),
        workers=1,
        validation_fraction=0.1,
        console=console,
    )


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text.txt, a tokenizer and prepared data (train and validation), made by the real tools.

    The first test process that needs it makes it for all: no test writes into it.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = shared / "workspace"
    with FileLock(shared / "workspace.lock"):
        if not (folder / "data").exists():
            folder.mkdir(exist_ok=True)
            make_workspace(folder)
    return folder
