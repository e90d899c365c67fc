"""Speed and memory of a training step beside Hugging Face's Trainer: same model, batch and optimizer, in one run.

    python -m tools.compare_with_trainer [--beside trainer|documents] [--steps 12] [--rounds 3] [--threads 2]

Each variant runs in a process of its own, interleaved, on the same random blocks; the first steps are warm-up. The
model is a RoBERTa with hidden size 256, 4 layers and a vocabulary of 50,265; the batch is 8 × 512 with dropout 0.1,
fp32, one rank. Printed: tokens/s and CPU seconds a step of each round (on a machine that is busy with other things the
latter tell more, with one thread above all), and peak memory of the process. With `--beside documents` the other
side is maskwright too, with document attention over documents of 128 tokens on average.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.config import Config, ObjectiveConfig
from trainer.config_file import parse_config
from trainer.data.vocabulary import Vocabulary
from trainer.objectives.masking import IGNORED_LABEL
from trainer.objectives.mlm import Batch, MaskedLanguageModelling

SEQ_LEN, MICRO_SIZE, VOCABULARY_SIZE = 512, 8, 50_265
MODEL = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
DOCUMENT_TOKENS = 128
WARMUP_STEPS = 2
VARIANTS = ("trainer", "documents", "maskwright")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beside", choices=VARIANTS[:2], default="trainer", help="what maskwright is compared with")
    parser.add_argument("--steps", type=int, default=12, help="timed steps a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        torch.set_num_threads(arguments.threads)
        if arguments.variant == "trainer":
            row = run_trainer(arguments.steps)
        else:
            row = run_maskwright(arguments.steps, document_attention=arguments.variant == "documents")
        print(json.dumps(row))
        return
    results: dict[str, list[dict[str, float]]] = {name: [] for name in (arguments.beside, "maskwright")}
    for number in range(arguments.rounds):
        for name in results:
            results[name].append(_in_own_process(name, arguments))
            print(f"round {number + 1}  {name:10}  {describe(results[name][-1])}", flush=True)
    print(f"load average {os.getloadavg()[0]:.2f}, {os.cpu_count()} cores, torch {torch.__version__}")
    medians = {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for name, rows in results.items()
    }
    for name, row in medians.items():
        print(f"median   {name:10}  {describe(row)}")
    over = {key: value / medians[arguments.beside][key] for key, value in medians["maskwright"].items()}
    print(
        f"maskwright over {arguments.beside}: {over['tokens_per_second']:.2f} × tokens/s, "
        f"{over['cpu_seconds']:.2f} × CPU seconds, {over['peak_gib']:.2f} × peak memory"
    )


def describe(row: dict[str, float]) -> str:
    return (
        f"{row['tokens_per_second']:8,.0f} tokens/s  {row['cpu_seconds']:6.2f} CPU s a step  "
        f"{row['peak_gib']:.2f} GiB  last loss {row['loss']:.4f}"
    )


def _in_own_process(variant: str, arguments: argparse.Namespace) -> dict[str, float]:
    options = ["--variant", variant, "--steps", str(arguments.steps), "--threads", str(arguments.threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    done = subprocess.run(
        [sys.executable, "-m", "tools.compare_with_trainer", *options], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"variant {variant} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def run_maskwright(steps: int, document_attention: bool) -> dict[str, float]:
    """Our engine at ZeRO-1 on one rank, as `train` builds it."""
    from trainer import distributed
    from trainer.batch_plan import plan_batch
    from trainer.deepspeed_config import compose, load_preset
    from trainer.engine import TrainingEngine
    from trainer.model.build import build_model
    from trainer.phases import lay_out

    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29871")
    config, vocabulary = _config(document_attention), _vocabulary()
    world = distributed.start()
    plan = plan_batch(config.batch, config.train, lay_out(config.data, config.batch), 1, [1])
    built = build_model(config.model, vocabulary, SEQ_LEN, seed=0)
    engine = TrainingEngine(built, compose(config, load_preset("zero1"), plan), config.optimizer, world)
    objective = MaskedLanguageModelling(config.objective, vocabulary, SEQ_LEN)
    batches = make_batches(steps + WARMUP_STEPS, document_attention)
    started, loss = _now(), torch.zeros(())
    for number, batch in enumerate(batches):
        if number == WARMUP_STEPS:
            started = _now()
        loss = objective.loss_sums(engine.network, batch, 1).sum() / len(batch["labels"])
        engine.backward(loss)
        engine.step(config.optimizer.lr)
    seconds = _now() - started
    distributed.stop()
    return _row(steps, seconds, float(loss.detach()))


def run_trainer(steps: int) -> dict[str, float]:
    """Hugging Face Trainer at the same settings, fed the same masked batches (its own collator is not timed)."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from trainer.model.build import build_model

    config = _config()
    model = build_model(config.model, _vocabulary(), SEQ_LEN, seed=0).model
    rows = [row for batch in make_batches(steps + WARMUP_STEPS) for row in as_trainer_rows(batch)]
    clock: dict[str, np.ndarray] = {}

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == WARMUP_STEPS:
                clock["start"] = _now()
            clock["end"] = _now()

    settings = config.optimizer
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(Path(folder)),
                per_device_train_batch_size=MICRO_SIZE,
                max_steps=steps + WARMUP_STEPS,
                learning_rate=settings.lr,
                lr_scheduler_type="constant",
                adam_beta1=settings.betas[0],
                adam_beta2=settings.betas[1],
                adam_epsilon=settings.eps,
                weight_decay=settings.weight_decay,
                max_grad_norm=settings.clip,
                optim="adamw_torch_fused",
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
                train_sampling_strategy="sequential",
            ),
            train_dataset=rows,  # type: ignore[arg-type]  # a list of rows is a map-style data set
            callbacks=[Clock()],
        )
        trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return _row(steps, clock["end"] - clock["start"], float(losses[-1]))


def make_batches(count: int, document_attention: bool = False) -> list[Batch]:
    """Masked batches over random tokens: what the tokens are does not change the work."""
    objective = MaskedLanguageModelling(ObjectiveConfig(), _vocabulary(), SEQ_LEN)
    generator = np.random.default_rng(0)
    blocks = generator.integers(5, VOCABULARY_SIZE, (count, MICRO_SIZE, SEQ_LEN - 2))
    samples = np.arange(count * MICRO_SIZE, dtype=np.uint64).reshape(count, MICRO_SIZE)
    starts = generator.random(blocks.shape) < 1 / DOCUMENT_TOKENS if document_attention else [None] * count
    rows = zip(blocks, samples, starts, strict=True)
    return [objective.make_batch(block, sample, 0, start) for block, sample, start in rows]


def as_trainer_rows(batch: Batch) -> list[dict[str, torch.Tensor]]:
    """The batch as Trainer takes it: full-length labels, an attention mask of ones."""
    labels = torch.full_like(batch["input_ids"], IGNORED_LABEL)
    labels.view(-1)[batch["prediction_index"]] = batch["labels"]
    ones = torch.ones(SEQ_LEN, dtype=torch.int64)
    return [
        {"input_ids": ids, "labels": row, "attention_mask": ones}
        for ids, row in zip(batch["input_ids"], labels, strict=True)
    ]


def _config(document_attention: bool = False) -> Config:
    model = {"preset": "roberta-base", "tokenizer": "unused", "overrides": MODEL}
    raw = {
        "run": {"dir": "unused"},
        "model": {**model, "document_attention": document_attention},
        "data": {"train": "unused", "seq_len": SEQ_LEN},
        "batch": {"global_size": MICRO_SIZE, "micro_size": MICRO_SIZE},
        "train": {"steps": 1, "precision": "fp32"},
    }
    return parse_config(raw, "compare_with_trainer")


def _vocabulary() -> Vocabulary:
    return Vocabulary(VOCABULARY_SIZE, 0, 2, 2, 4, 1, (0, 1, 2, 3, 4), "")


def _now() -> np.ndarray:
    """float64 [2]: seconds on the clock, and CPU seconds of this process."""
    return np.array([time.perf_counter(), time.process_time()])


def _row(steps: int, seconds: np.ndarray, loss: float) -> dict[str, float]:
    elapsed, computing = seconds.tolist()
    return {
        "tokens_per_second": steps * MICRO_SIZE * SEQ_LEN / elapsed,
        "cpu_seconds": computing / steps,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "loss": loss,
    }


if __name__ == "__main__":
    main()
