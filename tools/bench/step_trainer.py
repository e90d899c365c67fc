"""Hugging Face's Trainer in `maskwright bench step`: as a user would start it, fed with the same masked batches."""

from __future__ import annotations

import os
import tempfile
import time
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from tools.bench.common import cpu_seconds
from tools.bench.step_work import (
    LossWatch,
    PhaseClock,
    StepMeasurement,
    StepVariant,
    StepWork,
    as_trainer_rows,
    build_variant_model,
    make_config,
    make_work_samples,
    profile_steps,
    synchronize,
    training_batches,
    validation_batches,
)
from tools.machine import peak_resident_bytes
from trainer.config import Config
from trainer.sizing.flops import flops_per_token

# What DeepSpeed's documentation for Trainer starts from, with the stage that is compared.
_DEEPSPEED = {
    "zero_optimization": {"stage": 1},
    "zero_allow_untested_optimizer": True,
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "bf16": {"enabled": "auto"},
}


def run_trainer(work: StepWork, variant: StepVariant) -> StepMeasurement:
    """Train with Trainer and measure. Its collator only stacks rows that are masked already."""
    config = make_config(work, variant)
    objective = make_work_samples(work, config)
    batches = training_batches(work, variant, objective)
    rows = [row for batch in batches for row in as_trainer_rows(batch)]
    model = build_variant_model(work, config).model
    if variant.deepspeed:
        import trainer.engine.engine  # so that DeepSpeed does not compile its shared-memory all-reduce
    with tempfile.TemporaryDirectory() as folder:
        trainer = TimedTrainer(model=model, args=_arguments(work, variant, config, folder), train_dataset=rows)  # type: ignore[arg-type]  # a list of rows is a map-style data set
        watch = None
        if work.target_loss is not None:
            device = trainer.args.device
            watch = LossWatch(work.target_loss, validation_batches(work, variant, objective), device)
        course = Course(trainer, model, work, watch)
        trainer.add_callback(course)
        trainer.train()
        peak = course.peak_bytes()
        profiled = rows[work.all_steps * work.ranks * work.micro_size :]
        first = int(os.environ.get("RANK", "0")) * work.micro_size
        stride = work.ranks * work.micro_size

        def take_step(number: int) -> None:
            begin = first + number * stride
            inputs = trainer.data_collator(profiled[begin : begin + work.micro_size])
            wrapped: Any = trainer.model_wrapped
            trainer.training_step(wrapped, trainer._prepare_inputs(inputs))
            if not variant.deepspeed:  # whose backward is the step
                optimizer: Any = trainer.optimizer
                trainer.accelerator.clip_grad_norm_(wrapped.parameters(), config.optimizer.clip)
                optimizer.step()
                wrapped.zero_grad()

        operators, communication = profile_steps(take_step, trainer.args.device)
    steps = course.timed_steps
    return StepMeasurement(
        tokens=steps * work.tokens_per_step,
        wall_seconds=course.seconds[0],
        cpu_seconds=course.seconds[1],
        steps=steps,
        phases={name: seconds / steps for name, seconds in course.phases.items()},
        first_step_seconds=course.first_step_seconds,
        peak_bytes=peak,
        losses=torch.stack(trainer.losses).tolist()[: work.warmup_steps + steps],  # without the profiled ones
        flops_per_token=flops_per_token(model, work.seq_len, objective.head_rows / work.seq_len),
        communication=communication,
        operators=operators,
        seconds_to_loss=None if watch is None else watch.reached,
    )


def _arguments(work: StepWork, variant: StepVariant, config: Config, folder: str) -> TrainingArguments:
    """Make Trainer's arguments: its own defaults but for what has to be equal.

    That is batch, optimizer, precision and length. Nothing is logged.
    """
    settings, cpu = config.optimizer, not torch.cuda.is_available()
    return TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=work.micro_size,
        max_steps=work.all_steps,
        learning_rate=settings.lr,
        lr_scheduler_type="constant",
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        adam_epsilon=settings.eps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.clip,
        optim="adamw_torch_fused",
        bf16=work.precision == "bf16",
        torch_compile=bool(variant.compiled),
        deepspeed=dict(_DEEPSPEED) if variant.deepspeed else None,
        ddp_backend="gloo" if cpu and work.ranks > 1 else None,
        average_tokens_across_devices=False,  # else RoBERTa's loss, a mean already, is multiplied by the ranks
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        use_cpu=cpu,
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        seed=work.seed,
    )


class TimedTrainer(Trainer):
    """Marks where the phases of a step end, and keeps the losses without reading them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.clock = PhaseClock(self.args.device)
        self.losses: list[torch.Tensor] = []

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.clock.mark("backward")
        return loss

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.clock.mark("data")
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.losses.append((loss[0] if isinstance(loss, tuple) else loss).detach())
        self.clock.mark("forward")
        return loss


class Course(TrainerCallback):
    """Times the steps after the warm-up."""

    def __init__(self, trainer: TimedTrainer, model: Any, work: StepWork, watch: LossWatch | None) -> None:
        self._trainer, self._model, self._work, self._watch = trainer, model, work, watch
        self.first_step_seconds, self.timed_steps = 0.0, 0
        self.phases: dict[str, float] = {}
        self.seconds = (0.0, 0.0)
        self._started = (0.0, 0.0)
        self._begun = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begun = self._begun or time.perf_counter()
        if state.global_step == self._work.warmup_steps == 0:
            self._restart()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        clock, device, step = self._trainer.clock, self._trainer.args.device, state.global_step
        clock.mark("optimizer")
        if step == 1:
            synchronize(device)
            self.first_step_seconds = time.perf_counter() - self._begun
        done = self._watch is not None and self._watch.step_done(self._model)
        if step == self._work.all_steps or done:
            self.phases = clock.seconds()
            self.seconds = (time.perf_counter() - self._started[0], cpu_seconds() - self._started[1])
            self.timed_steps = step - self._work.warmup_steps
            control.should_training_stop = True
        elif step == self._work.warmup_steps:
            self._restart()

    def _restart(self) -> None:
        self._trainer.clock.restart()
        self._started = (time.perf_counter(), cpu_seconds())

    def peak_bytes(self) -> int:
        device = self._trainer.args.device
        return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident_bytes()
