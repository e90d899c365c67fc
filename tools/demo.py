"""`maskwright demo`: the whole path on one laptop CPU, from text that is already on the disk to filled masks.

Nothing is downloaded and nothing is shipped: the corpus is the documentation inside the installed Python packages.
Each step is the command a user would type; it is printed before it runs.
"""

from __future__ import annotations

import math
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

from tools.baselines import unigram_cross_entropy
from trainer.errors import EXIT_FINISHED, EXIT_STOPPED_AFTER_SAVING, MaskwrightError, UserError
from trainer.runtime.paths import real_path, user_path
from trainer.tracking.jsonl import read_metrics

MARKER = ".maskwright-demo"
RANKS = 2
"""At most: fewer where there are fewer GPUs than that, but for none, when ranks compute on the CPU."""
CORPUS_BYTES = 6_000_000
VOCABULARY_SIZE = 4096
INTERRUPT_AT_STEP = 600
SENTENCES = (
    "If the file does not exist, an {mask} is raised.",
    "This function returns a new {mask} with the same shape and dtype.",
    "The default {mask} is None.",
    "This method should be called {mask} the object is created.",
    "Return the {mask} of elements in the array.",
    "If this is not {mask}, the default value will be used.",
    "It can be used to {mask} the size of the image.",
    "Each of {mask} following is a list.",
)
"""Written for this, in the manner of documentation."""


def run_demo(directory: str | None, console: Console) -> None:
    """Run all: corpus, tokenizer, shards, training that is interrupted, report, Hugging Face model, filled masks."""
    started = time.monotonic()
    folder = _fresh_folder(user_path("demo" if directory is None else directory, "--dir"))
    console.rule("1. Text: the documentation of the installed Python packages")
    from tools.sample_corpus import write_corpus

    write_corpus(folder / "corpus", CORPUS_BYTES)
    console.rule("2. A tokenizer")
    _maskwright(console, folder, f"tokenizer train --input corpus --output tokenizer --vocab-size {VOCABULARY_SIZE}")
    console.rule("3. Shards")
    _maskwright(
        console, folder, "prepare --input corpus --tokenizer tokenizer --output data --validation-fraction 0.03"
    )
    ranks = rank_count()
    console.rule(
        f"4. Training on {ranks} rank{'s' if ranks > 1 else ''} with DeepSpeed ZeRO-1, interrupted at step "
        f"{INTERRUPT_AT_STEP}"
    )
    train = f"train demo --nproc-per-node {ranks}"
    _maskwright(console, folder, train, interrupt_at_step=INTERRUPT_AT_STEP)
    console.rule("5. The same command goes on where it stopped")
    _maskwright(console, folder, train)
    console.rule("6. A page that shows the run")
    _maskwright(console, folder, "report run")
    console.rule("7. A Hugging Face model")
    _maskwright(console, folder, "convert run --output model")
    console.rule("8. Filled masks, in plain transformers")
    _fill_masks(console, folder / "model")
    _summary(console, folder, time.monotonic() - started)


def rank_count() -> int:
    """Say how many ranks the demo trains on: each needs a GPU of its own where there are any."""
    import torch

    return min(RANKS, torch.cuda.device_count() or RANKS)


def _fresh_folder(folder: Path) -> Path:
    """Make the demo's folder, empty. One of an earlier demo is cleared, any other is left alone."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not (folder / MARKER).is_file():
            raise UserError(
                f"'{folder}' exists and is not an earlier demo.",
                where=f"--dir {folder}",
                remedy="Choose another --dir.",
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).write_text("made by `maskwright demo`; cleared by the next one\n")
    return real_path(folder)


def _maskwright(console: Console, folder: Path, arguments: str, interrupt_at_step: int | None = None) -> None:
    """Run one maskwright command in the demo's folder; at `interrupt_at_step`, signal it as SLURM would."""
    console.print(f"$ maskwright {arguments}", markup=False)
    command = [sys.executable, "-m", "launcher", *shlex.split(arguments)]
    process = subprocess.Popen(command, cwd=folder)
    try:
        if interrupt_at_step is not None:
            _wait_for_step(process, folder / "run" / "metrics.jsonl", interrupt_at_step)
            process.send_signal(signal.SIGUSR1)
        code = process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    expected = EXIT_FINISHED if interrupt_at_step is None else EXIT_STOPPED_AFTER_SAVING
    if code != expected:
        raise MaskwrightError(
            f"`maskwright {arguments}` ended with exit code {code} instead of {expected}.",
            where=str(folder),
            remedy=f"The logs are in {folder / 'run' / 'logs'}.",
        )
    if interrupt_at_step is not None:
        console.print(f"(exit code {code}: stopped on request after saving)")


def _wait_for_step(process: subprocess.Popen[bytes], metrics: Path, step: int) -> None:
    while process.poll() is None:
        lines = read_metrics(metrics)
        if lines and lines[-1]["step"] >= step:
            return
        time.sleep(0.2)


def _fill_masks(console: Console, model: Path) -> None:
    from transformers import pipeline

    fill = pipeline("fill-mask", model=str(model), device="cpu")
    assert fill.tokenizer is not None
    for sentence in SENTENCES:
        answers = fill(sentence.format(mask=fill.tokenizer.mask_token), top_k=3)
        words = ", ".join(f"{answer['token_str'].strip()} ({answer['score']:.0%})" for answer in answers)
        console.print(f"{sentence.format(mask='___')}  →  {words}", markup=False)


def _summary(console: Console, folder: Path, seconds: float) -> None:
    evaluations = [line for line in read_metrics(folder / "run" / "metrics.jsonl") if "eval/loss" in line]
    first, last = evaluations[0]["eval/loss"], evaluations[-1]["eval/loss"]
    by_frequency = unigram_cross_entropy(folder / "data" / "train", folder / "data" / "validation", VOCABULARY_SIZE)
    console.rule("Done")
    for line in (
        f"loss on held-out text: {first:.2f} untrained → {last:.2f} after {evaluations[-1]['step']} steps; perplexity "
        f"{math.exp(first):,.0f} → {math.exp(last):,.0f}",
        f"  to compare: {math.log(VOCABULARY_SIZE):.2f} by guessing among {VOCABULARY_SIZE:,} tokens, "
        f"{by_frequency:.2f} by knowing how frequent each is",
        f"  it is {by_frequency - last:.2f} below that, which is what it makes of the words around",
        f"took {seconds / 60:.1f} minutes; everything is in {folder}",
        f"  text        {folder / 'corpus'}",
        f"  tokenizer   {folder / 'tokenizer'}",
        f"  shards      {folder / 'data'}   (maskwright data show {folder / 'data'})",
        f"  run         {folder / 'run'}   (tensorboard --logdir {folder / 'run' / 'tensorboard'})",
        f"  report      {folder / 'run' / 'report.html'}   (open it in a browser)",
        f"  model       {folder / 'model'}   (AutoModelForMaskedLM.from_pretrained)",
    ):
        console.print(line, markup=False, soft_wrap=True)
