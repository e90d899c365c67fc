"""The loops of `maskwright bench step` that are ours to write: a plain torch loop, and the engine that `train` uses."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as functional

from tools.bench.common import cpu_seconds
from tools.bench.step_work import (
    LossWatch,
    PhaseClock,
    StepMeasurement,
    StepVariant,
    StepWork,
    build_variant_model,
    make_vocabulary,
    profile_steps,
    synchronize,
    validation_batches,
)
from tools.machine import peak_resident_bytes
from trainer.config import Config
from trainer.data.batch import Batch
from trainer.data.blocks import IGNORED_LABEL
from trainer.data.order.permutation import KeyPurpose, fold_key
from trainer.engine.optimizer import build_optimizer
from trainer.model.build import constant_inputs
from trainer.model.cpu_dropout import seed_dropout
from trainer.model.prediction_head import install
from trainer.objectives.mlm import TERM, MaskedSamples
from trainer.objectives.objective import loss_sums
from trainer.objectives.registry import make_criterion
from trainer.runtime import distributed
from trainer.runtime.host_memory import keep_freed_memory
from trainer.sizing.flops import flops_per_token

logger = logging.getLogger(__name__)


class TorchStepper:
    """What one writes without a framework: AdamW, gradient clipping, DDP for several ranks."""

    def __init__(self, work: StepWork, variant: StepVariant, config: Config) -> None:
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
        if not cuda and variant.keeps_memory:
            keep_freed_memory()
        self.model: Any = build_variant_model(work, config).model
        self.model.to(self.device)
        self._positions = install(self.model) if variant.masked_head else None
        self._settings = config.optimizer
        self._optimizer = build_optimizer(self.model, config.optimizer)
        if variant.padding_mask:
            ones = torch.ones(work.micro_size, work.seq_len, dtype=torch.int64, device=self.device)
            self._inputs = {"attention_mask": ones}
        else:
            self._inputs = constant_inputs(self.model, work.seq_len, self.device)
        self._autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=work.precision == "bf16")
        self._network = self.model
        if work.ranks > 1:
            if cuda:
                torch.cuda.set_device(self.device)
            dist.init_process_group("nccl" if cuda else "gloo")
            self._network = torch.nn.parallel.DistributedDataParallel(self.model)
        if config.model.compile:
            self._network = torch.compile(self._network, dynamic=False)

    def forward(self, batch: Batch) -> torch.Tensor:
        index, labels = batch.prediction_index, batch.labels[TERM]
        assert index is not None
        with self._autocast:
            if self._positions is not None:
                with self._positions.select(index):
                    logits = self._network(input_ids=batch.inputs["input_ids"], **self._inputs).logits
                return functional.cross_entropy(logits.float(), labels)
            input_ids = batch.inputs["input_ids"]
            full = torch.full_like(input_ids, IGNORED_LABEL).flatten().index_copy(0, index, labels)
            return self._network(input_ids=input_ids, labels=full.view_as(input_ids), **self._inputs)["loss"]

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def optimize(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._settings.clip)
        self._optimizer.step()
        self._optimizer.zero_grad()


class EngineStepper:
    """The engine and the objective as `trainer.train` puts them together, dropout seeded at each step."""

    def __init__(self, work: StepWork, config: Config) -> None:
        from trainer.engine.deepspeed_config import compose, load_preset
        from trainer.engine.engine import TrainingEngine
        from trainer.engine.loss_kernel import resolve_loss_kernel
        from trainer.model.attention_backend import preferring, resolve_attention_backend
        from trainer.schedule.batch_plan import plan_batch
        from trainer.schedule.phases import lay_out

        self._world = distributed.start()
        plan = plan_batch(config.batch, config.train, lay_out(config.data, config.batch), self._world.size, [1])
        preset = compose(config, load_preset(config.deepspeed), plan)
        built = build_variant_model(work, config)
        backend = resolve_attention_backend(
            config, built.model.config, work.micro_size, self._world, logger.info, keep=False
        )
        self._attention = ExitStack()  # for as long as this object lives
        self._attention.enter_context(preferring(backend, self._world.device))
        self.engine = TrainingEngine(built, preset, config.optimizer, self._world)
        if config.model.compile:
            self.engine.compile(config.model.compile, shapes=1)
        self._config, self._step = config, 0
        self._criterion = make_criterion(config, resolve_loss_kernel(config, make_vocabulary(work).size, self._world))
        self.model, self.device = self.engine.module, self._world.device

    def forward(self, batch: Batch) -> torch.Tensor:
        self._step += 1
        key = fold_key(KeyPurpose.DROPOUT, self._config.run.seed, self._step, 0, self._world.rank)
        seed_dropout(int(key) >> 1, self.device)
        return loss_sums(self._criterion, self.engine.network, batch, 1).sum() / len(batch.labels[TERM])

    def backward(self, loss: torch.Tensor) -> None:
        self.engine.backward(loss)

    def optimize(self) -> None:
        self.engine.step(self._config.optimizer.lr)


def drive(
    work: StepWork, variant: StepVariant, stepper: Any, batches: Sequence[Batch], objective: MaskedSamples
) -> StepMeasurement:
    """Train and measure; the same for all loops of ours."""
    device: torch.device = stepper.device
    if device.type == "cuda":
        batches = [batch.pin_memory() for batch in batches]
    watch = None
    if work.target_loss is not None:
        watch = LossWatch(work.target_loss, validation_batches(work, variant, objective), device)
    clock, losses = PhaseClock(device), list[torch.Tensor]()
    begun, first_step_seconds, started, steps = time.perf_counter(), 0.0, (0.0, 0.0), 0
    for number, batch in enumerate(batches[: work.all_steps]):
        if number == work.warmup_steps:
            clock.restart()
            started, steps = (time.perf_counter(), cpu_seconds()), 0
        losses.append(_take_step(stepper, batch, clock))
        steps += 1
        if number == 0:
            synchronize(device)
            first_step_seconds = time.perf_counter() - begun
        if watch is not None and watch.step_done(stepper.model):
            break
    phases = clock.seconds()
    wall, cpu = time.perf_counter() - started[0], cpu_seconds() - started[1]
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident_bytes()
    operators, communication = profile_steps(
        lambda number: _take_step(stepper, batches[work.all_steps + number], clock), device
    )
    if dist.is_initialized():
        dist.destroy_process_group()
    return StepMeasurement(
        tokens=steps * work.tokens_per_step,
        wall_seconds=wall,
        cpu_seconds=cpu,
        steps=steps,
        phases={name: seconds / steps for name, seconds in phases.items()},
        first_step_seconds=first_step_seconds,
        peak_bytes=peak,
        losses=torch.stack(losses).tolist(),
        flops_per_token=flops_per_token(stepper.model, work.seq_len, objective.head_rows / work.seq_len),
        communication=communication,
        operators=operators,
        seconds_to_loss=None if watch is None else watch.reached,
    )


def _take_step(stepper: Any, batch: Batch, clock: PhaseClock) -> torch.Tensor:
    moved = batch.to(stepper.device)
    clock.mark("data")
    loss = stepper.forward(moved)
    clock.mark("forward")
    stepper.backward(loss)
    clock.mark("backward")
    stepper.optimize()
    clock.mark("optimizer")
    return loss.detach()
