"""The DeepSpeed engine: the one place that knows DeepSpeed's ways. Nothing else imports it.

What it hides: the gradient norm and the non-finite guard at stage 0, float buffers that DeepSpeed casts away,
checkpoint files written with errors caught and bytes recorded, and the four shapes of a checkpoint.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trainer.config import OptimizerConfig
from trainer.distributed import World
from trainer.errors import DamagedError, UserError
from trainer.files import file_hash
from trainer.model.build import BuiltModel, constant_inputs, fp32_buffers, restore_fp32_buffers
from trainer.model.document_attention import DocumentAttention
from trainer.model.prediction_head import install

if TYPE_CHECKING:
    from trainer.objectives.mlm import Documents

# DeepSpeed otherwise warns at import, before our logging can hold it.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

logger = logging.getLogger(__name__)

# On CPU DeepSpeed compiles a shared-memory all-reduce when it starts (45 s the first time, and it needs a compiler),
# which only its inference uses. (Plain import would find torch itself under that name.)
_backend: Any = importlib.import_module("deepspeed.comm.torch")
_backend.build_shm_op = lambda: None


class RecordingCheckpointEngine(TorchCheckpointEngine):
    """Writes checkpoint files durably and remembers what it wrote, or why it could not.

    A failing rank must not raise inside DeepSpeed's save: the others would wait for it in a barrier. The error
    is kept, and the ranks vote when all of them have returned.
    """

    def __init__(self) -> None:
        super().__init__()
        self.written: dict[str, tuple[int, str]] = {}
        self.error: BaseException | None = None

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        try:
            Path(path).mkdir(parents=True, exist_ok=exist_ok)
        except OSError as error:
            self.error = error

    def save(self, state_dict: Any, path: str) -> None:
        if self.error is not None:
            return
        try:
            with open(path, "wb") as file:
                torch.save(state_dict, file)
                file.flush()
                os.fsync(file.fileno())
            self.written[Path(path).name] = (Path(path).stat().st_size, file_hash(Path(path)))
        except (OSError, RuntimeError) as error:
            # torch's writer raises a RuntimeError about positions in the file; the cause is behind it.
            self.error = error if isinstance(error, OSError) else error.__context__ or error


class TrainingEngine:
    """A model under DeepSpeed: forward, backward, step, save, load."""

    def __init__(self, built: BuiltModel, ds_config: dict[str, Any], optimizer: OptimizerConfig, world: World) -> None:
        self.world = world
        self.stage: int = ds_config["zero_optimization"]["stage"]
        self.accumulation: int = ds_config["gradient_accumulation_steps"]
        self.micro_size: int = ds_config["train_micro_batch_size_per_gpu"]
        accelerator = get_accelerator()
        assert accelerator is not None
        if ds_config["fp16"]["enabled"] and not accelerator.is_fp16_supported():
            raise UserError(
                "This device cannot train in fp16.",
                where="train.precision=fp16",
                remedy="Set train.precision to bf16 or fp32.",
            )
        model = built.model
        self._positions = install(model)
        buffers = fp32_buffers(model)
        adamw = build_optimizer(model, optimizer)
        # Any: DeepSpeed's own annotations leave its optimizer and device open
        self._engine: Any = deepspeed.initialize(model=model, optimizer=adamw, config=ds_config)[0]
        restore_fp32_buffers(model, buffers)
        self.module = model
        self.device = world.device
        self.document_attention = DocumentAttention(model, world.device) if built.document_attention else None
        self._constants: dict[int, dict[str, torch.Tensor]] = {}  # by seq_len
        self._recorder = RecordingCheckpointEngine()
        self._engine.checkpoint_engine = self._recorder
        # It copies scripts into the checkpoint, and a full disk cuts it short with an error on one rank.
        self._engine._copy_recovery_script = lambda *_: None
        self._grad_norm: float | None = None
        self._discard_step = False
        if self.stage == 0:
            adamw.register_step_pre_hook(self._discard_gradients_if_asked)

    def compile(self) -> None:
        """torch.compile the module; shapes are static."""
        self._engine.compile(compile_kwargs={"dynamic": False})

    def network(
        self, input_ids: torch.Tensor, prediction_index: torch.Tensor, documents: Documents | None = None
    ) -> torch.Tensor:
        """Logits [n, vocabulary] at the flat positions `prediction_index` [n] of `input_ids` [B, S].

        With `documents` attention stays within them; without, each block is one sequence.
        """
        seq_len = input_ids.shape[1]
        if seq_len not in self._constants:
            self._constants[seq_len] = constant_inputs(self.module, seq_len, self.device)
        inputs = self._constants[seq_len]
        if documents is not None:
            assert self.document_attention is not None
            inputs = {**inputs, **self.document_attention.inputs(documents)}
        with self._positions.select(prediction_index):
            output = self._engine(input_ids=input_ids, **inputs)
        return self._positions.logits(output.logits, prediction_index)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a micro-batch; they are averaged over ranks and micro-batches."""
        self._engine.backward(loss)

    def step(self, learning_rate: float | None = None) -> bool:
        """End a micro-batch; after the last one of the step, update the weights.

        Args:
            learning_rate: of this step; needed at its last micro-batch.

        Returns:
            False when the update was skipped because a gradient was not finite.
        """
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return True
        assert learning_rate is not None
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.stage == 0:
            grads = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
            self._grad_norm = float(torch.nn.utils.get_total_norm(grads))
            self._discard_step = not math.isfinite(self._grad_norm)
        self._engine.step()
        return self._engine.was_step_applied() and not self._discard_step

    def _discard_gradients_if_asked(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Without gradients AdamW leaves weights and state alone: the stage-0 form of a skipped step."""
        if self._discard_step:
            optimizer.zero_grad(set_to_none=True)

    @property
    def grad_norm(self) -> float:
        """Global 2-norm of the last step's gradients, before clipping."""
        norm = self._grad_norm if self._grad_norm is not None else self._engine.get_global_grad_norm()
        return math.nan if norm is None else float(norm)

    @property
    def loss_scale(self) -> float:
        """Loss scale of fp16; 1 in other precisions."""
        return float(getattr(self._engine.optimizer, "loss_scale", 1.0)) if self._engine.fp16_enabled() else 1.0

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Dropout off, no gradients."""
        self._engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._engine.train()

    def save(self, folder: Path) -> dict[str, tuple[int, str]]:
        """Write this rank's checkpoint files into `folder`; every rank calls it, and every rank returns.

        Returns:
            Name → (bytes, xxh3_128) of the files this rank wrote.

        Raises:
            OSError: when this rank could not write. The caller makes the ranks vote.
        """
        self._recorder.written, self._recorder.error = {}, None
        self._engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)
        if self._recorder.error is not None:
            raise OSError(str(self._recorder.error)) from self._recorder.error
        return self._recorder.written

    def load(self, folder: Path) -> None:
        """Load weights and optimizer state written at the same world size and stage."""
        path, _ = self._engine.load_checkpoint(str(folder.parent), tag=folder.name)
        if path is None:
            raise DamagedError(
                "DeepSpeed could not load the checkpoint.", where=str(folder), remedy="See the rank logs."
            )


def build_optimizer(model: torch.nn.Module, settings: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with the usual groups: biases and norm weights (one-dimensional parameters) are not decayed.

    Fused, as torch offers it on CUDA and CPU; under ZeRO it runs over flat partitions either way.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)


def read_weights(folder: Path, stage: int) -> dict[str, torch.Tensor]:
    """Full fp32 weights of a checkpoint of any ZeRO stage, on the CPU."""
    if stage == 0:
        return _module_state(folder)
    first_rank = next(folder.glob("*zero_pp_rank_0_*_optim_states.pt"))
    if "zero_stage" not in torch.load(first_rank, mmap=True, weights_only=False)["optimizer_state_dict"]:
        return _read_bf16_optimizer_weights(folder)
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    weights = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name)
    assert weights is not None
    return dict(weights)


def _read_bf16_optimizer_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Weights from BF16_Optimizer's files (stage 1, fp32 accumulation), which DeepSpeed's reader refuses.

    Each rank's file maps parameter names to fragments of its flat fp32 partitions; in rank order the fragments of a
    name make up the parameter.
    """
    module = _module_state(folder)
    fragments: dict[str, list[torch.Tensor]] = {}
    ranks = sorted(folder.glob("bf16_zero_pp_rank_*"), key=lambda path: int(path.name.split("_")[4]))
    for path in ranks:
        state = torch.load(path, map_location="cpu", weights_only=False)["optimizer_state_dict"]
        for flat, mapping in zip(state["single_partition_of_fp32_groups"], state["param_slice_mappings"], strict=True):
            for name, place in mapping.items():
                fragments.setdefault(name, []).append(flat[place.start : place.start + place.numel])
    weights = {name: torch.cat(parts).view(module[name].shape).float() for name, parts in fragments.items()}
    by_storage = {module[name].data_ptr(): weight for name, weight in weights.items()}  # tied names share storage
    return {
        name: weights.get(name, by_storage.get(tensor.data_ptr(), tensor.float())) for name, tensor in module.items()
    }


def _module_state(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)["module"]
