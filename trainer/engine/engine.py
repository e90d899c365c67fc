"""The DeepSpeed engine: the one place that knows DeepSpeed's ways. Nothing else imports it.

What it hides: the gradient norm and the non-finite guard at stage 0, float buffers that DeepSpeed casts away,
and the writing of checkpoint files, which is ours.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from trainer.config import CUDA_GRAPHS, OptimizerConfig, RopeTheta
from trainer.engine.deepspeed_config import QUANTIZED_KEYS
from trainer.engine.flat_optimizer import FlatOptimizer, RankPlace
from trainer.engine.grad_norm import sum_of_squares
from trainer.engine.optimizer import build_optimizer
from trainer.engine.partitions import PARAMETER_NAMES, Partitions
from trainer.engine.snapshot import HostBuffers, Snapshot
from trainer.engine.step_guard import StepGuard
from trainer.engine.zero_patches import forget_skipped_gradients, patch_zero_optimizer, raise_scale_after_step
from trainer.errors import UserError
from trainer.model.build import BuiltModel
from trainer.model.compiling import compile_options, expect_shapes
from trainer.model.cpu_dropout import seed_dropout, use_host_dropout
from trainer.model.hidden_matrices import hidden_matrices
from trainer.model.rope_theta import set_theta
from trainer.model.trained import forward_of
from trainer.runtime.distributed import World, all_gather

# DeepSpeed otherwise warns at import, before our logging can hold it.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

logger = logging.getLogger(__name__)

# On CPU DeepSpeed compiles a shared-memory all-reduce when it starts (45 s the first time, and it needs a compiler),
# which only its inference uses. (Plain import would find torch itself under that name.)
_backend: Any = importlib.import_module("deepspeed.comm.torch")
_backend.build_shm_op = lambda: None


class CapturingCheckpointEngine(TorchCheckpointEngine):
    """Takes what DeepSpeed would write, for us to write when DeepSpeed has left its barriers.

    A failing rank must not raise inside DeepSpeed's save: the others would wait for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.snapshot = Snapshot()

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Do nothing: the folder is there."""

    def save(self, state_dict: Any, path: str) -> None:
        self.snapshot.add(Path(path), state_dict)


def _in_steps(call: Callable[..., Any]) -> Callable[..., Any]:
    """Say before each forward pass that what the last one returned may be written over, as CUDA graphs do."""

    def begin_and_call(**arguments: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return call(**arguments)

    return begin_and_call


def _refuse_what_the_device_cannot(ds_config: dict[str, Any], world: World) -> None:
    accelerator = get_accelerator()
    assert accelerator is not None
    if ds_config["fp16"]["enabled"] and not accelerator.is_fp16_supported():
        raise UserError(
            "This device cannot train in fp16.",
            where="train.precision=fp16",
            remedy="Set train.precision to bf16 or fp32.",
        )
    quantized = [key for key in QUANTIZED_KEYS if ds_config["zero_optimization"].get(key)]
    if quantized and world.device.type == "cpu":
        raise UserError(
            "DeepSpeed quantizes on GPUs only.",
            where=f"deepspeed: zero_optimization.{quantized[0]}",
            remedy="Remove it, or train on GPUs.",
        )


class TrainingEngine:
    """A module under DeepSpeed: forward, backward, step, save.

    Attributes:
        network: runs the module.
        exports: the stock models in it, as in `BuiltModel`.
        frozen: on rank 0, the parameters that are kept as they are, by name: fp32, on the CPU, in their shapes.
    """

    def __init__(
        self,
        built: BuiltModel,
        ds_config: dict[str, Any],
        optimizer: OptimizerConfig,
        world: World,
        updates: Mapping[str, float] | None = None,
    ) -> None:
        """Wrap a model; every rank calls it.

        Args:
            updates: as for `build_optimizer`.

        Raises:
            UserError: for what this device cannot do.
        """
        self.world = world
        self.stage: int = ds_config["zero_optimization"]["stage"]
        _refuse_what_the_device_cannot(ds_config, world)
        module = built.module
        self.network = forward_of(module, world.device, built.document_attention)
        if world.device.type == "cpu":
            for model in built.exports.values():
                use_host_dropout(model)
        # As they are before DeepSpeed rounds or partitions them: no copy, what they were is only not let go of.
        weights = dict(module.named_parameters())
        self.frozen = {name: weights[name].detach() for name in built.frozen if world.is_main}
        self._frozen_names = frozenset(built.frozen)
        own_optimizer = build_optimizer(module, optimizer, updates, hidden_matrices(module, built.exports))
        # Any: DeepSpeed's own annotations leave its optimizer and device open
        self._engine: Any = deepspeed.initialize(model=module, optimizer=own_optimizer, config=ds_config)[0]
        self.network.call = self._engine
        zero = self._engine.optimizer
        if isinstance(zero, DeepSpeedZeroOptimizer):
            if zero.cpu_offload:
                forget_skipped_gradients(zero)
            else:
                patch_zero_optimizer(zero, own_optimizer, world.size)
        self._raise_scale = raise_scale_after_step(zero) if self._engine.fp16_enabled() else lambda: None
        self.module, self.exports = module, built.exports
        self._rope_theta: RopeTheta | None = None
        self.device = world.device
        self.document_attention = self.network.document_attention
        self._capturing = CapturingCheckpointEngine()
        self._host_buffers = HostBuffers()
        self._engine.checkpoint_engine = self._capturing
        # It copies scripts into the checkpoint, and a full disk cuts it short with an error on one rank.
        self._engine._copy_recovery_script = lambda *_: None
        self._tell_layout(own_optimizer)
        self._guard = StepGuard(own_optimizer, lambda: self._engine.optimizer._global_grad_norm)

    def _tell_layout(self, optimizer: torch.optim.Optimizer) -> None:
        """Tell an optimizer of our own which parameters lie in the tensors that it updates; a collective."""
        if isinstance(optimizer, FlatOptimizer):
            layouts = self.partitions.layouts(lambda value: all_gather(self.world, value))
            optimizer.lay_out(layouts, RankPlace(self.world.rank, self.world.size, self.world.device))

    def compile(self, mode: bool | str, shapes: int) -> None:
        """Compile the module by torch.compile; shapes are static.

        Args:
            mode: as `model.compile` in a config. With CUDA graphs, what a forward pass returns, and the gradients, are
                overwritten by the next one.
            shapes: of batches that it will be given, in training and in evaluation.
        """
        expect_shapes(shapes)
        self._engine.compile(compile_kwargs=compile_options(mode))
        if mode == CUDA_GRAPHS:
            self.network.call = _in_steps(self._engine)

    def close(self) -> None:
        """Let go of what DeepSpeed holds, for an engine that another one follows in this process."""
        self._engine.destroy()

    def seed_dropout(self, seed: int) -> None:
        """Seed what draws dropout in the next forward pass; in [0, 2^63)."""
        seed_dropout(seed, self.device)

    def set_rope_theta(self, theta: RopeTheta | None) -> None:
        """Compute with this theta from here on; None leaves the models as they are."""
        if theta is None or theta == self._rope_theta:
            return
        for model in self.exports.values():
            set_theta(model, theta)
        self._rope_theta = theta

    def begin_step(self, micro_size: int, accumulation: int, rope_theta: RopeTheta | None = None) -> None:
        """Say how many micro-batches the next step has, and of how many sequences; they may differ from step to step.

        DeepSpeed ends a step where the number of micro-batches so far divides by the accumulation. That holds with
        another accumulation only if the count begins anew.

        Args:
            rope_theta: as for `set_rope_theta`.
        """
        self.set_rope_theta(rope_theta)
        self._engine.set_train_micro_batch_size(micro_size)
        self._engine.set_train_batch_size(micro_size * accumulation * self.world.size)
        self._engine.micro_steps = 0

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a micro-batch; they are averaged over ranks and micro-batches.

        Those of a loss that is not finite become NaN, so that the step is skipped on all ranks: the gradients of an
        infinite cross-entropy may well be finite. The host does not wait for it, and a finite loss keeps every bit.
        """
        self._engine.backward(loss * (1 + 0 * loss.detach()))

    def step(self, learning_rate: float | None = None, max_grad_norm: float | None = None) -> bool:
        """End a micro-batch; after the last one of the step, update the weights.

        Args:
            learning_rate: of this step; needed at its last micro-batch.
            max_grad_norm: skip the update when the gradients' global norm is above it; None does not read the norm.

        Returns:
            False when the update was skipped because a gradient was not finite, or the norm above its bound. Weights
            and optimizer state are then as they were.
        """
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return True
        assert learning_rate is not None
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._guard.begin(max_grad_norm)
        if self.stage == 0:
            grads = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
            self._guard.decide(sum_of_squares(grads).sqrt())
        self._engine.step()
        self._raise_scale()
        return self._engine.was_step_applied() and not self._guard.has_withheld

    @property
    def grad_norm(self) -> float:
        """Global 2-norm of the last step's gradients, before clipping."""
        norm = self._guard.norm if self._guard.norm is not None else self._engine.get_global_grad_norm()
        return math.nan if norm is None else float(norm)

    @property
    def loss_scale(self) -> float:
        """Loss scale of fp16; 1 in other precisions."""
        return float(getattr(self._engine.optimizer, "loss_scale", 1.0)) if self._engine.fp16_enabled() else 1.0

    def is_finite(self) -> bool:
        """Tell whether this rank's weights, master weights and optimizer state are finite.

        A sum is finite only if all that it adds is: one pass at the speed of memory, without a copy. The flat tensors
        are not summed whole: what pads them at stage 3 was never written, and may hold anything.
        """
        tensors: list[torch.Tensor] = [*self.module.parameters()]
        for fragment in self.partitions.fragments():
            tensors.extend(fragment.tensors.values())
        sums = [tensor.detach().sum(dtype=torch.float32).to(self.device) for tensor in tensors]
        return bool(torch.stack(sums).isfinite().all())

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Turn dropout off, and compute no gradients."""
        self._engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._engine.train()

    def capture(self, folder: Path, detached: bool) -> Snapshot:
        """Capture this rank's checkpoint files, to be written into the existing `folder`; every rank calls it.

        Those that were captured before have been written.

        Args:
            detached: as copies, so that training may go on before they are written.
        """
        self._host_buffers.take_back()
        self._capturing.snapshot = snapshot = Snapshot(self._host_buffers if detached else None)
        state = {PARAMETER_NAMES: self._parameter_names()} if self.stage == 0 else {}
        self._engine.save_checkpoint(
            str(folder.parent),
            tag=folder.name,
            client_state=state,
            save_latest=False,
            exclude_frozen_parameters=bool(self._frozen_names),  # `frozen` has them, unrounded
        )
        self._capturing.snapshot = Snapshot()
        return snapshot

    def _parameter_names(self) -> list[list[str]]:
        """List the names of the parameters of each optimizer group; at stage 0 DeepSpeed records none."""
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        return [
            [names[id(parameter)] for parameter in group["params"]] for group in self._engine.optimizer.param_groups
        ]

    @property
    def partitions(self) -> Partitions:
        """This rank's share of master weights and optimizer state."""
        return Partitions(self.module, self._engine.optimizer, self.stage, self.world.rank, self._frozen_names)

    def set_progress(
        self, buffers: dict[str, torch.Tensor], counters: dict[str, int], loss_scaler: dict[str, Any]
    ) -> None:
        """Take over what a checkpoint holds beside weights and optimizer state.

        Args:
            loss_scaler: values of DeepSpeed's, by attribute; used if both runs are in fp16 with the same kind of scale,
                static or dynamic.
        """
        own = dict(self.module.named_buffers())
        for name, value in buffers.items():
            own[name].copy_(value)
        self._rope_theta = None  # frequencies may be among them (ESM)
        for name, value in counters.items():
            setattr(self._engine, name, value)
        own_scaler = vars(self._engine.optimizer.loss_scaler) if self._engine.fp16_enabled() else {}
        if own_scaler and loss_scaler.get("dynamic") == own_scaler["dynamic"]:
            numbers = {name: value for name, value in loss_scaler.items() if isinstance(value, (int, float))}
            own_scaler.update(numbers)

    def refresh_forward_weights(self) -> None:
        """Let the forward pass see master weights that were written from outside; a collective."""
        self.partitions.refresh_forward_weights()
