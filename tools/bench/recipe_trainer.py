"""Hugging Face's Trainer in `maskwright bench recipe`, in a process of its own, with its own loop and collator."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback, TrainingArguments

from tools.bench.common import cpu_seconds
from tools.bench.recipe import EVALUATIONS
from tools.bench.recipe_report import RecipeMeasurement
from tools.bench.step_work import synchronize
from tools.evaluate.at_rest import ModelAtRest
from tools.prepare.on_demand import prepare_raw_text
from trainer.config import Config, ScheduleConfig
from trainer.config.file import load_config
from trainer.data.block_reader import BlockReader, block_count
from trainer.evaluation.evaluator import Evaluator
from trainer.inputs.inputs import Inputs, open_inputs
from trainer.model.trained import build_trained
from trainer.objectives.mlm import MaskedSamples
from trainer.objectives.registry import family_of, make_criterion, make_samples
from trainer.runtime.distributed import World
from trainer.runtime.signals import StopRequest
from trainer.schedule.batch_plan import micro_sizes
from trainer.schedule.learning_rate import decay_steps

_USUAL_BATCH = 8  # Trainer's default a device


@dataclass(frozen=True)
class PlanLength:
    """How long a run is, in optimizer steps."""

    steps: int


def plan_length(name: str, overrides: Sequence[str]) -> PlanLength:
    """Prepare the text of a config, where it is raw, and plan its run."""
    return PlanLength(_open(load_config(name, list(overrides))).plan.total_steps)


def train_by_trainer(
    name: str,
    overrides: Sequence[str],
    tuned: bool,
    every_steps: int | None,
    target: float | None,
    folder: str,
) -> RecipeMeasurement:
    """Train the model of a config on its blocks by Trainer, for as many tokens as the config's run has.

    Args:
        tuned: with the config's numbers; else with Trainer's own.
        every_steps: of the config's run, between two evaluations: here for as many tokens.
        target: held-out loss at which to end.
    """
    inputs = _open(load_config(name, list(overrides)))
    config, plan = inputs.config, inputs.plan
    built = build_trained(config, inputs.vocabulary, family_of(config))
    assert isinstance(inputs.objective, MaskedSamples)
    rows = Rows(inputs, inputs.objective)
    batch = plan.global_size if tuned else _USUAL_BATCH
    tokens = plan.tokens_ahead(0, plan.total_steps)
    steps = max(1, math.ceil(tokens / (batch * config.data.seq_len)))
    every = every_steps or math.ceil(plan.total_steps / EVALUATIONS)
    collator = DataCollatorForLanguageModeling(
        inputs.tokenizer, mlm_probability=config.objective.mask_ratios[-1][1] if tuned else 0.15
    )
    trainer = Trainer(
        model=built.model,
        args=TrainingArguments(folder, max_steps=steps, **_usual(config), **(_tuned(inputs) if tuned else {})),
        train_dataset=rows,
        data_collator=collator,
    )
    every = max(1, round(every * plan.global_size / batch))
    watch = HeldOutLoss(inputs, built.model, every, steps, batch * config.data.seq_len, target)
    trainer.add_callback(watch)
    started = cpu_seconds()
    trainer.train()
    *_, (_, done, seconds, _) = watch.curve
    return RecipeMeasurement(int(done), seconds, cpu_seconds() - started, watch.curve)


def _open(config: Config) -> Inputs:
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"), control=None)
    folders = prepare_raw_text(config, world, StopRequest(), lambda _: None, of_run=False)
    fitting = [size for size in micro_sizes(config.data, config.batch, 1) if size <= _USUAL_BATCH]
    return open_inputs(config, 1, True, folders, fitting[-1] if config.batch.micro_size == "auto" else None)


def _usual(config: Config) -> dict[str, Any]:
    """Make the arguments that both arms have: what is no matter of the recipe, and the training precision."""
    return {
        "seed": config.run.seed,
        "bf16": config.train.precision == "bf16",
        "fp16": config.train.precision == "fp16",
        "use_cpu": not torch.cuda.is_available(),
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


def _tuned(inputs: Inputs) -> dict[str, Any]:
    """Make the arguments that say what the config says; its optimizer is AdamW whatever the config has."""
    optimizer, plan = inputs.config.optimizer, inputs.plan
    return {
        "per_device_train_batch_size": plan.micro_size,
        "gradient_accumulation_steps": plan.accumulation,
        "learning_rate": optimizer.lr,
        "adam_beta1": optimizer.betas[0],
        "adam_beta2": optimizer.betas[1],
        "adam_epsilon": optimizer.eps,
        "weight_decay": optimizer.weight_decay,
        "max_grad_norm": optimizer.clip,
        **scheduler_arguments(inputs.config.schedule, plan.total_steps),
    }


def scheduler_arguments(schedule: ScheduleConfig, total_steps: int) -> dict[str, Any]:
    """Say a resolved schedule in Trainer's arguments; its rate at a step is ours of the step before."""
    floor = schedule.min_ratio
    name, more = {
        # Trainer's linear one falls to 0 only; the other can fall to anything by a line, over all that is left.
        "linear": ("warmup_stable_decay", {"decay_type": "linear", "min_lr_ratio": floor}),
        "cosine": ("cosine_with_min_lr", {"min_lr_rate": floor}),
        "wsd": ("warmup_stable_decay", {"decay_type": schedule.decay, "min_lr_ratio": floor}),
        "constant": ("constant_with_warmup", {}),
    }[schedule.name]
    if name == "warmup_stable_decay":
        most = total_steps - (schedule.warmup_steps or 0)
        more["num_decay_steps"] = min(most, decay_steps(total_steps, schedule)) if schedule.name == "wsd" else most
    return {"warmup_steps": schedule.warmup_steps, "lr_scheduler_type": name, "lr_scheduler_kwargs": more}


class Rows(Dataset):
    """The blocks that the config trains on, framed and not masked, as Trainer's collator takes them."""

    def __init__(self, inputs: Inputs, samples: MaskedSamples) -> None:
        self._samples = samples
        self._readers = [BlockReader(source, samples) for source in inputs.sources]
        self._ends = np.cumsum([block_count(source, samples) for source in inputs.sources])
        special = np.zeros(samples.seq_len, np.int64)
        special[[0, -1]] = 1
        self._special = special.tolist()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, number: int) -> dict[str, list[int]]:
        source = int(np.searchsorted(self._ends, number, side="right"))
        first = int(self._ends[source - 1]) if source else 0
        tokens = self._samples.frame(self._readers[source].read(np.array([number - first]))).tokens[0]
        return {"input_ids": tokens.tolist(), "special_tokens_mask": self._special}


class HeldOutLoss(TrainerCallback):
    """Evaluates a copy of the model by the code of training, and keeps the time without that.

    Attributes:
        curve: as `RecipeMeasurement`.
    """

    def __init__(
        self, inputs: Inputs, model: Any, every: int, steps: int, step_tokens: int, target: float | None
    ) -> None:
        config = inputs.config
        assert inputs.validation is not None
        samples = make_samples(config, inputs.vocabulary, config.data.seq_len, evaluating=True)
        self._evaluator = Evaluator(
            inputs.validation, samples, make_criterion(config), config.eval.samples, inputs.plan.micro_size
        )
        self._model, self._every, self._steps = model, every, steps
        self._step_tokens, self._target = step_tokens, target
        self._precision = config.train.precision
        self._seconds, self._started = 0.0, 0.0
        self.curve: list[list[float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._evaluate(0, args.device)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        if step % self._every and step != self._steps:
            return
        synchronize(args.device)
        self._seconds += time.perf_counter() - self._started
        loss = self._evaluate(step, args.device)
        if self._target is not None and loss <= self._target:
            control.should_training_stop = True

    def _evaluate(self, step: int, device: torch.device) -> float:
        world = World(rank=0, size=1, local_rank=0, device=device, control=None)
        # A copy: what evaluates takes hold of the head, which Trainer's model must keep as it is.
        model = ModelAtRest(copy.deepcopy(self._model), device, self._precision, document_attention=False)
        values = self._evaluator.run(model, world)
        assert values is not None, "nothing asks it to stop"
        self.curve.append([step, step * self._step_tokens, self._seconds, values["eval/loss"]])
        self._started = time.perf_counter()
        return values["eval/loss"]
