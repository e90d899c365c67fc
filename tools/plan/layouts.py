"""A run on so many GPUs at a ZeRO stage and micro-batch: memory, traffic and time of a step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from tools.plan.devices import Device, MeasuredStep
from tools.plan.wire import Wire, matrix_traffic, plan_traffic
from trainer.engine.deepspeed_config import load_preset, zero_stage
from trainer.engine.newton_schulz import iteration_flops
from trainer.engine.state_size import WEIGHT_BYTES
from trainer.schedule.batch_plan import micro_sizes
from trainer.sizing.flops import flops_per_token, prediction_flops, step_flops
from trainer.sizing.memory_estimate import MemoryEstimate
from trainer.sizing.zero_memory import RankMemory, ZeroSettings


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step: all forward and backward passes, traffic as if nothing hid it, the update.

    `iterations` are those of Muon on its matrices, beside all that AdamW would do.
    """

    passes: float
    traffic: float
    update: float
    iterations: float = 0.0

    @property
    def seconds(self) -> float:
        return self.passes + self.traffic + self.update + self.iterations

    @property
    def traffic_share(self) -> float:
        return self.traffic / self.seconds


@dataclass(frozen=True)
class Layout:
    """One way to run a config."""

    world_size: int
    zero: ZeroSettings
    micro_size: int
    accumulation: int
    memory: RankMemory
    wire: Wire
    time: StepTime
    fits: bool
    global_tokens: int

    @property
    def stage(self) -> int:
        return self.zero.stage

    @property
    def tokens_per_second(self) -> float:
        return self.global_tokens / self.time.seconds


class Layouts:
    """All layouts of one config on one kind of device.

    Args:
        attended_tokens: how many tokens a token attends to on average, for the FLOPs.
        measured: a benchmark to time passes and updates by, in place of the model.
    """

    def __init__(
        self,
        estimate: MemoryEstimate,
        device: Device,
        gpus_per_node: int,
        attended_tokens: float,
        measured: MeasuredStep | None,
    ) -> None:
        self.estimate, self.device, self.measured = estimate, device, measured
        self.gpus_per_node, self.config = gpus_per_node, estimate.config
        self._attended_tokens = attended_tokens

    @cached_property
    def flops_per_token(self) -> float:
        models, seq_len, teacher = self.estimate.models, self.config.data.seq_len, self.estimate.teacher
        predicted = self.estimate.head_rows / seq_len
        a_token = step_flops(models, self._attended_tokens, seq_len) + predicted * prediction_flops(models)
        if teacher is not None:
            a_token += flops_per_token(teacher.model, self._attended_tokens, predicted)
        return a_token

    def attention_share(self, attended_tokens: float, seq_len: int) -> float:
        """Compute which share of a token's training FLOPs is that of scores and their sums.

        Args:
            attended_tokens: how many tokens a token attends to on average, in blocks of `seq_len`.
        """
        models = self.estimate.models
        return 1 - step_flops(models, 0.0, seq_len) / step_flops(models, attended_tokens, seq_len)

    @cached_property
    def stages(self) -> dict[int, ZeroSettings]:
        """Settings by stage: the config's own preset at its stage, those in ds_configs/ at the others.

        Half precision has no stage 0 (`deepspeed_config.check_precision`).
        """
        own = self.estimate.zero
        numbers = range(0 if self.config.train.precision == "fp32" else 1, 4)
        presets = {number: own if number == own.stage else _preset(number) for number in numbers}
        return presets

    def largest_micro_size(self, world_size: int, zero: ZeroSettings) -> int | None:
        """Find the largest micro-batch that divides the batch and fits."""
        sizes = micro_sizes(self.config.data, self.config.batch, world_size)
        return self.estimate.largest(sizes, world_size, self.device.usable_bytes, zero)

    def layout(self, world_size: int, micro_size: int, zero: ZeroSettings) -> Layout:
        """Compute a layout; `micro_size` must divide the global batch over the ranks."""
        config = self.config
        accumulation = config.batch.global_size // (micro_size * world_size)
        memory = self.estimate.memory(micro_size, world_size, accumulation, zero)
        estimate = self.estimate
        precision, on_cpu = config.train.precision, estimate.device_type == "cpu"
        travelling = matrix_traffic(estimate.matrix_shapes, zero.stage, world_size, precision, on_cpu)
        wire = plan_traffic(zero, estimate.parameter_sizes, accumulation, precision, estimate.frozen_sizes, travelling)
        return Layout(
            world_size=world_size,
            zero=zero,
            micro_size=micro_size,
            accumulation=accumulation,
            memory=memory,
            wire=wire,
            time=self._time(world_size, micro_size, accumulation, zero, wire),
            fits=memory.peak <= self.device.usable_bytes,
            global_tokens=config.batch.global_size * config.data.seq_len,
        )

    def _time(self, world_size: int, micro_size: int, accumulation: int, zero: ZeroSettings, wire: Wire) -> StepTime:
        device, parameters = self.device, self.estimate.parameters
        if self.measured is not None:  # whole steps were measured, updates included
            tokens = micro_size * accumulation * self.config.data.seq_len
            passes, update = tokens * self.flops_per_token / self.measured.flops, 0.0
        else:
            step = self.estimate.step(micro_size)
            passes = accumulation * step.seconds(device.flops, device.memory_bandwidth)
            weight = WEIGHT_BYTES[self.config.train.precision]
            # AdamW reads weight, gradient and two moments and writes three of them and the weight of the forward pass;
            # gradients are copied into a bucket and scaled there.
            own = (28 + weight) * parameters / (world_size if zero.stage else 1)
            update = (own + 4 * weight * parameters) / device.memory_bandwidth
        iterations = self._iteration_flops(world_size) / device.flops
        rate = device.node_bytes if world_size <= self.gpus_per_node else device.network_bytes
        # Where overlap_comm is on, the backward pass hides a part of it; how much is not modelled.
        return StepTime(passes, wire.sent_bytes(world_size) / rate, update, iterations)

    def _iteration_flops(self, world_size: int) -> float:
        """Count what a rank computes of Muon's iterations: its share, or a matrix, which one rank computes alone."""
        each = [iteration_flops(shape) for shape in self.estimate.matrix_shapes]
        return max(sum(each) / world_size, *each) if each else 0.0


def _preset(stage: int) -> ZeroSettings:
    preset = load_preset(f"zero{stage}")
    assert zero_stage(preset) == stage
    return ZeroSettings.of(preset)
