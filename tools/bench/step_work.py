"""The work that every variant of `maskwright bench step` does: model, batches, and what is measured of a step.

All of it is a function of `StepWork`, so that processes that know nothing of each other train the same model on the
same masked batches.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as functional

from tools.bench.common import Measurement
from tools.bench.synthetic import VOCABULARY_SIZE, learnable_tokens
from trainer.config import Config
from trainer.config.file import parse_config
from trainer.data.batch import Batch
from trainer.data.blocks import DOCUMENT_STARTS, IGNORED_LABEL, Blocks
from trainer.data.dataset import ShardSet
from trainer.data.manifest import read_data_manifest, split_folder
from trainer.data.order.permutation import KeyPurpose, fold_key, permute
from trainer.data.tokenizer import Vocabulary
from trainer.errors import UserError
from trainer.model.build import BuiltModel, build_model
from trainer.objectives.mlm import TERM, MaskedSamples

SMALL_MODEL = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
EVALUATION_STEPS = 10  # between two evaluations on the way to a loss
PROFILED_STEPS = 2
_VALIDATION_BATCHES = 2
_OPERATORS = 25  # of a profile
_DOCUMENT_TOKENS = 128


@dataclass(frozen=True)
class StepWork:
    """What is trained, and how long.

    Attributes:
        model: "small", the name of a preset, or the path of a config.json.
        micro_size: sequences a rank and step; there is no accumulation.
        steps: timed ones, after `warmup_steps`.
        dropout: of everything; None leaves it to the model.
        data: a prepared data set; None draws tokens that a model can learn something of.
        target_loss: train until the validation loss is down to it, `steps` at the most; None times steps.
    """

    model: str = "small"
    micro_size: int = 8
    seq_len: int = 512
    ranks: int = 1
    precision: str = "fp32"
    steps: int = 8
    warmup_steps: int = 2
    threads: int = 1
    seed: int = 0
    dropout: float | None = None
    data: str | None = None
    target_loss: float | None = None

    @property
    def all_steps(self) -> int:
        return self.warmup_steps + self.steps

    @property
    def tokens_per_step(self) -> int:
        return self.ranks * self.micro_size * self.seq_len


@dataclass(frozen=True)
class StepVariant:
    """One way to train.

    Attributes:
        loop: "trainer" (Hugging Face), "torch" (a plain loop) or "ours" (the engine, as `train` builds it).
        masked_head: the vocabulary projection at predicted positions only.
        padding_mask: a mask of ones is passed, as Trainer's collators make it.
        attention_dropout: as the model has it; False turns it off.
        compiled: as `model.compile` in a config.
        keeps_memory: `trainer.runtime.host_memory`, on CPU.
        deepspeed: under DeepSpeed, ZeRO stage 1.
        optimizer: as `optimizer.name` in a config; of the loop "ours" alone.
    """

    name: str
    what: str
    loop: str
    masked_head: bool = False
    padding_mask: bool = True
    attention_dropout: bool = True
    compiled: bool | str = False
    keeps_memory: bool = False
    deepspeed: bool = False
    document_attention: bool = False
    optimizer: str = "adamw"

    @property
    def is_the_same_work(self) -> bool:
        """Whether it computes what most variants do, so that losses are to be equal."""
        return not self.document_attention and self.optimizer == "adamw"


@dataclass(frozen=True)
class StepMeasurement(Measurement):
    """One variant's steps in one process a rank, seen by rank 0; warm-up is in `losses` and `first_step_seconds` only.

    Attributes:
        phases: seconds a step by the clock (CUDA: of the device) in data, forward, backward, optimizer.
        communication: seconds a step in collectives, in steps under the profiler; may overlap with the phases.
        operators: the profile: name, milliseconds a step and calls a step, the most expensive first.
        peak_bytes: of the process on CPU, of the device's allocations on CUDA.
        losses: mean cross-entropy of this rank's micro-batch of each step.
        seconds_to_loss: of training until the validation loss was reached; None when it was not, or not asked for.
    """

    steps: int
    phases: dict[str, float]
    first_step_seconds: float
    peak_bytes: int
    losses: list[float]
    flops_per_token: float
    communication: float = 0.0
    operators: list[dict[str, Any]] = field(default_factory=list)
    seconds_to_loss: float | None = None


class Stepper(Protocol):
    """What differs between the loops that we write ourselves; `model` is the stock class."""

    model: Any

    def forward(self, batch: Batch) -> torch.Tensor:
        """Compute the mean cross-entropy."""
        ...

    def backward(self, loss: torch.Tensor) -> None: ...

    def optimize(self) -> None: ...


def make_config(work: StepWork, variant: StepVariant) -> Config:
    """Make the run config of a variant; its paths are not used."""
    overrides: dict[str, Any] = dict(SMALL_MODEL) if work.model == "small" else {}
    if work.dropout is not None:
        overrides.update(hidden_dropout_prob=work.dropout, attention_probs_dropout_prob=work.dropout)
    if not variant.attention_dropout:
        overrides["attention_probs_dropout_prob"] = 0.0
    source = {"config": work.model} if Path(work.model).exists() else {"preset": work.model}
    if work.model == "small":
        source = {"preset": "roberta-base"}
    raw = {
        "run": {"dir": "unused", "seed": work.seed},
        "model": {
            **source,
            "tokenizer": "unused",
            "overrides": overrides,
            "document_attention": variant.document_attention,
            "compile": variant.compiled,
        },
        "data": {"train": "unused", "seq_len": work.seq_len},
        "batch": {"global_size": work.micro_size * work.ranks, "micro_size": work.micro_size},
        "optimizer": {"name": variant.optimizer},
        "train": {"steps": work.all_steps, "precision": work.precision},
        "deepspeed": "zero1",
    }
    return parse_config(raw, f"bench step, {variant.name}")


def make_vocabulary(work: StepWork) -> Vocabulary:
    """Make a vocabulary with RoBERTa's ids, and with its size or that of the data set."""
    size = VOCABULARY_SIZE
    if work.data is not None:
        size = read_data_manifest(split_folder(work.data, "train")).vocabulary_size
    return Vocabulary(size, 0, 2, 2, 4, 1, (0, 1, 2, 3, 4), "")


def make_work_samples(work: StepWork, config: Config) -> MaskedSamples:
    return MaskedSamples(config.objective, make_vocabulary(work), work.seq_len)


def build_variant_model(work: StepWork, config: Config) -> BuiltModel:
    """Build the model of a variant, with the same weights for every variant."""
    return build_model(config.model, make_vocabulary(work), work.seq_len, work.seed)


def training_batches(work: StepWork, variant: StepVariant, objective: MaskedSamples) -> list[Batch]:
    """Make all micro-batches, a step's behind each other in the order of ranks; PROFILED_STEPS more than trained."""
    return _batches(work, variant, objective, 0, (work.all_steps + PROFILED_STEPS) * work.ranks)


def validation_batches(work: StepWork, variant: StepVariant, objective: MaskedSamples) -> list[Batch]:
    """Make micro-batches that are not among the training batches."""
    first = (work.all_steps + PROFILED_STEPS) * work.ranks
    return _batches(work, variant, objective, first, _VALIDATION_BATCHES)


def _batches(work: StepWork, variant: StepVariant, objective: MaskedSamples, first: int, count: int) -> list[Batch]:
    samples = np.arange(first * work.micro_size, (first + count) * work.micro_size, dtype=np.uint64)
    blocks = _read_blocks(work, objective, samples)
    starts = {}
    if variant.document_attention:
        starts[DOCUMENT_STARTS] = np.random.default_rng(work.seed).random(blocks.shape) < 1 / _DOCUMENT_TOKENS
    return [
        objective.make_batch(
            Blocks(blocks[rows], {mark: each[rows] for mark, each in starts.items()}), samples[rows], work.seed
        )
        for rows in (slice(number, number + work.micro_size) for number in range(0, len(samples), work.micro_size))
    ]


def check_data(work: StepWork, objective: MaskedSamples) -> None:
    """Raise UserError when the data have fewer blocks than the work takes."""
    if work.data is None:
        return
    needed = (work.all_steps + PROFILED_STEPS) * work.ranks * work.micro_size
    needed += _VALIDATION_BATCHES * work.micro_size * (work.target_loss is not None)
    available = _shards_of(work.data).block_count(objective.view.payload)
    if available < needed:
        raise UserError(
            f"The data has {available:,} blocks of {work.seq_len}, and {needed:,} are needed.",
            where=f"--data {work.data}",
            remedy="Give more data, or lower --steps, --micro or --seq-len.",
        )


def _shards_of(data: str) -> ShardSet:
    return ShardSet(split_folder(data, "train"))


def _read_blocks(work: StepWork, objective: MaskedSamples, samples: np.ndarray) -> np.ndarray:
    """Read or make the tokens [n, payload] of the sample numbers."""
    if work.data is None:
        return learnable_tokens(len(samples), objective.view.payload, work.seed + int(samples[0]))
    shards = _shards_of(work.data)
    key = fold_key(KeyPurpose.EVALUATION, work.seed)
    numbers = permute(samples, shards.block_count(objective.view.payload), key).astype(np.int64)
    return shards.read_blocks(numbers, objective.view.payload)


def as_trainer_rows(batch: Batch) -> list[dict[str, torch.Tensor]]:
    """Turn the batch into rows as Trainer takes them: full-length labels, an attention mask of ones."""
    labels = torch.full_like(batch.inputs["input_ids"], IGNORED_LABEL)
    labels.view(-1)[batch.prediction_index] = batch.labels[TERM]
    ones = torch.ones(labels.shape[1], dtype=torch.int64)
    return [
        {"input_ids": ids, "labels": row, "attention_mask": ones}
        for ids, row in zip(batch.inputs["input_ids"], labels, strict=True)
    ]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PhaseClock:
    """Where the time of steps goes: each `mark` ends a phase that began at the last one.

    On CUDA the times are those of the device, by events: the host does not wait in a step.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.restart()

    def restart(self) -> None:
        synchronize(self._device)
        self._marks: list[tuple[str, Any]] = [("", self._stamp())]

    def mark(self, phase: str) -> None:
        self._marks.append((phase, self._stamp()))

    def seconds(self) -> dict[str, float]:
        """Add up the seconds of each phase since the restart, all steps together."""
        synchronize(self._device)
        totals: Counter[str] = Counter()
        for (_, before), (phase, after) in zip(self._marks, self._marks[1:], strict=False):
            totals[phase] += before.elapsed_time(after) / 1000 if self._device.type == "cuda" else after - before
        return dict(totals)

    def _stamp(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class LossWatch:
    """Seconds of training, evaluations left out, until the validation loss is down to its target."""

    def __init__(self, target: float, batches: Sequence[Batch], device: torch.device) -> None:
        self.reached: float | None = None
        self._target, self._batches, self._device = target, batches, device
        self._steps, self._seconds, self._started = 0, 0.0, time.perf_counter()

    def step_done(self, model: torch.nn.Module) -> bool:
        """Count a step, evaluate every EVALUATION_STEPS steps, and tell whether the target is reached."""
        self._steps += 1
        if self._steps % EVALUATION_STEPS:
            return False
        synchronize(self._device)
        self._seconds += time.perf_counter() - self._started
        if validation_loss(model, self._batches, self._device) <= self._target:
            self.reached = self._seconds
        self._started = time.perf_counter()
        return self.reached is not None


@torch.no_grad()
def validation_loss(model: torch.nn.Module, batches: Sequence[Batch], device: torch.device) -> float:
    """Compute the mean cross-entropy of a stock masked-LM model over the predictions of some batches."""
    model.eval()
    losses = []
    for batch in batches:
        logits = model(input_ids=batch.inputs["input_ids"].to(device)).logits.flatten(0, 1)
        assert batch.prediction_index is not None
        predicted = logits[batch.prediction_index.to(device)].float()
        losses.append(float(functional.cross_entropy(predicted, batch.labels[TERM].to(device))))
    model.train()
    return sum(losses) / len(losses)


def operators_of(profile: Any, device: torch.device) -> tuple[list[dict[str, Any]], float]:
    """Find the most expensive operators, and seconds a step in collectives, in a profile of PROFILED_STEPS steps."""
    cuda = device.type == "cuda"
    events = profile.key_averages()
    rows = [
        {
            "name": event.key,
            "milliseconds": (event.self_device_time_total if cuda else event.self_cpu_time_total)
            / (1000 * PROFILED_STEPS),
            "calls": event.count / PROFILED_STEPS,
        }
        for event in events
    ]
    rows.sort(key=lambda row: -row["milliseconds"])
    # Over gloo a collective is a span of no operator's own time.
    spans = [event for event in events if event.key.startswith("ncclDevKernel" if cuda else "gloo:")]
    microseconds = sum(span.device_time_total if cuda else span.cpu_time_total for span in spans)
    return rows[:_OPERATORS], microseconds / 1e6 / PROFILED_STEPS


def profile_steps(take_step: Any, device: torch.device) -> tuple[list[dict[str, Any]], float]:
    """Profile PROFILED_STEPS further steps: their operators, and seconds a step in collectives."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        for number in range(PROFILED_STEPS):
            take_step(number)
        synchronize(device)
    return operators_of(profiler, device)
