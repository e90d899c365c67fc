"""What a run's model takes in memory for any micro-batch, from its config alone: traced activations and ZeRO state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from trainer.config import Config
from trainer.data.tokenizer import Vocabulary
from trainer.errors import UserError
from trainer.model.build import COMPUTE_DTYPES
from trainer.model.classes import MAIN
from trainer.model.frozen import freeze
from trainer.model.hidden_matrices import hidden_matrices
from trainer.model.teacher import TeacherModel, teacher_config
from trainer.model.trained import model_configs, models_in, put_together, rehearse_trained
from trainer.objectives.registry import family_of, make_criterion, make_samples
from trainer.sizing.made_up import made_up_batch
from trainer.sizing.meta_trace import META, DeviceType, StepTracer, TracedStep, meta_model
from trainer.sizing.update_memory import OptimizerSizes, muon_workspace, stable_adamw_workspace
from trainer.sizing.zero_memory import RankMemory, ZeroSettings, rank_memory


class MemoryEstimate:
    """What a config trains, on the meta device, and the memory of a rank that trains it.

    Args:
        preset: of DeepSpeed.
        device_type: where it will be trained.
        seq_len: tokens a block; None for those of `data.seq_len`.

    Attributes:
        module, models: as `BuiltModel.module` and `exports`.

    Raises:
        UserError: as `build_config` and `freeze`.
    """

    def __init__(
        self,
        config: Config,
        vocabulary: Vocabulary,
        preset: dict[str, Any],
        device_type: DeviceType,
        seq_len: int | None = None,
    ) -> None:
        configs = model_configs(config, vocabulary, family_of(config))
        self.config, self.zero = config, ZeroSettings.of(preset)
        self.device_type: DeviceType = device_type
        self._vocabulary = vocabulary
        dtype = COMPUTE_DTYPES[config.train.precision]
        self.module = put_together(config, {name: meta_model(each, dtype) for name, each in configs.items()})
        self.models = models_in(self.module)
        sizes = {name: parameter.numel() for name, parameter in self.module.named_parameters()}
        self.frozen_sizes = [sizes[name] for name in freeze(self.module, config.model.frozen)]
        self.seq_len = seq_len or config.data.seq_len
        self.teacher = self._taught_by()
        self.samples = make_samples(config, vocabulary, self.seq_len)
        self.head_rows = self.samples.head_rows
        self._traced: dict[int, TracedStep] = {}

    def _taught_by(self) -> TeacherModel | None:
        """Build the teacher without storage, where there is one."""
        if self.config.objective.teacher is None:
            return None
        config = teacher_config(self.config, self._vocabulary, family_of(self.config))
        model = meta_model(config, COMPUTE_DTYPES[self.config.train.precision])
        return TeacherModel(model, META, self.config.model.document_attention)

    @cached_property
    def parameter_sizes(self) -> list[int]:
        """Elements of each trained parameter, tied ones once."""
        return [parameter.numel() for parameter in self.module.parameters() if parameter.requires_grad]

    @property
    def class_name(self) -> str:
        """The class of the main model."""
        return type(self.models[MAIN]).__name__

    @property
    def parameters(self) -> int:
        """Elements of all trained parameters."""
        return sum(self.parameter_sizes)

    @cached_property
    def matrix_shapes(self) -> list[tuple[int, ...]]:
        """Of the weights that Muon updates; none with another optimizer."""
        if self.config.optimizer.name != "muon":
            return []
        weights = dict(self.module.named_parameters())
        return [tuple(weights[name].shape) for name in hidden_matrices(self.module, self.models)]

    @property
    def matrices(self) -> int:
        """Elements of the weights that Muon updates."""
        return sum(map(math.prod, self.matrix_shapes))

    @property
    def frozen(self) -> int:
        """Elements of all parameters that `model.frozen` names."""
        return sum(self.frozen_sizes)

    def step(self, micro_size: int) -> TracedStep:
        """Trace a forward and backward pass of a micro-batch."""
        if micro_size not in self._traced:
            if not self._traced:
                settings = self.config.model
                self._tracer = StepTracer(
                    self.module,
                    self.device_type,
                    make_criterion(self.config, taught_by=self.teacher),
                    settings.document_attention,
                    settings.activation_checkpointing,
                )
            self._traced[micro_size] = self._tracer.trace(made_up_batch(self.samples, micro_size))
        return self._traced[micro_size]

    def memory(
        self, micro_size: int, world_size: int, accumulation: int, zero: ZeroSettings | None = None
    ) -> RankMemory:
        """Estimate the memory of a rank in a steady step; `zero` in place of the preset's settings.

        Raises:
            UserError: as `rehearse_trained`, for a model that cannot compute a block, and for one that cannot without
                values.
        """
        try:
            memory = rank_memory(
                self.parameters,
                world_size,
                accumulation,
                self.config.train,
                zero or self.zero,
                self.step(micro_size),
                on_cpu=self.device_type == "cpu",
                frozen=self.frozen,
                optimizer=self._optimizer_sizes(world_size, zero or self.zero),
            )
            teacher = 0 if self.teacher is None else self.teacher.weight_bytes  # whole on each rank, at any stage
            return replace(memory, weights=memory.weights + teacher, update=memory.update + teacher)
        except Exception as error:
            # A card where the model cannot compute a block, or none without values; else the fault is ours.
            lengths = [self.config.data.seq_len, self.seq_len]
            rehearse_trained(self.config, self._vocabulary, lengths, family_of(self.config))
            if not isinstance(error, RuntimeError):
                raise
            raise UserError(
                f"The memory of {self.class_name} cannot be foreseen, because it cannot compute a block "
                f"without values: {error}",
                where="model",
                remedy="Set batch.micro_size to a number and try it with `maskwright train --dry-run`.",
            ) from error

    def _optimizer_sizes(self, world_size: int, zero: ZeroSettings) -> OptimizerSizes:
        name, on_cpu = self.config.optimizer.name, self.device_type == "cpu"
        if name == "muon":
            work = muon_workspace(self.matrix_shapes, zero.stage, world_size, on_cpu)
        else:
            work = stable_adamw_workspace(self.parameter_sizes, world_size) if name == "stable_adamw" else 0
        return OptimizerSizes(self.matrices, work)

    def largest(
        self, sizes: Sequence[int], world_size: int, budget_bytes: float, zero: ZeroSettings | None = None
    ) -> int | None:
        """Find the largest of ascending micro-batches whose memory is within a budget; None when none is."""
        global_size, low, high = self.config.batch.global_size, 0, len(sizes)
        while low < high:  # memory grows with the micro-batch
            middle = (low + high) // 2
            size = sizes[middle]
            accumulation = global_size // (size * world_size)
            if self.memory(size, world_size, accumulation, zero).peak <= budget_bytes:
                low = middle + 1
            else:
                high = middle
        return sizes[low - 1] if low else None
