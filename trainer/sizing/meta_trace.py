"""A forward and backward pass on torch's meta device: what it would hold in memory, move and compute.

Nothing is computed and no memory taken, but every operation of the real pass is seen with its shapes, in order,
forward and backward. From them follow the bytes alive at each moment, the bytes that each kernel reads and writes,
and its FLOPs. What an operation takes for itself, inside, is not seen; nor is what torch.compile fuses.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as functional
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import PretrainedConfig, PreTrainedModel

from trainer.data.batch import Batch
from trainer.model.causal_attention import positions_run_through
from trainer.model.classes import MAIN, model_class
from trainer.model.hf_config import attention_of, vocabulary_rows
from trainer.model.trained import forward_of, models_in
from trainer.objectives.objective import Criterion, loss_sums

META = torch.device("meta")
_LOOKUPS = ("embedding", "index_select", "index", "gather")  # read no more of a table than they return
_WITHOUT_WORK = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_ATEN = torch.ops.aten
# The CPU's flash kernels, which torch's counter does not know, take what CUDA's take.
_COUNTED_AS = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _ATEN._scaled_dot_product_flash_attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _ATEN._scaled_dot_product_flash_attention_backward,
}
DeviceType = Literal["cpu", "cuda"]


class TracedStep:
    """A micro-batch, forward and backward, in eager mode; `trainer.sizing.zero_memory.PassPeaks` among what it says.

    Each kind of pass is traced when it is first asked for, which takes some tenths of a second.

    Args:
        one_pass: does the forward and the backward pass.
        vocabulary_size: rows of the table of tokens.
    """

    def __init__(self, model: nn.Module, one_pass: Callable[[], None], vocabulary_size: int) -> None:
        self._model, self._one_pass, self._vocabulary_size = model, one_pass, vocabulary_size

    @property
    def activations(self) -> int:
        """Bytes beyond the weights, without gradients, each of which is taken away as it comes."""
        return self._freeing.peak

    @property
    def with_gradients(self) -> int:
        """Bytes beyond the weights, gradients included, in a pass that makes them."""
        return self._making

    @property
    def adding(self) -> int:
        """Bytes beyond the weights, gradients included, in a pass that adds to those of an earlier one."""
        return self._adding

    @property
    def logits_bytes(self) -> int:
        """Of `activations`, what has the vocabulary for its last dimension.

        That are logits, their copy in fp32, their log-softmax and its gradient.
        """
        return self._freeing.logits_at_peak

    @property
    def kernels(self) -> Counter[tuple[int, int]]:
        """(FLOPs, bytes moved) → how many such kernels the two passes have."""
        return self._freeing.kernels

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """Estimate by a roofline: each kernel takes what its arithmetic or its traffic takes, whichever is longer."""
        return sum(
            count * max(flops / flops_per_second, moved / bytes_per_second)
            for (flops, moved), count in self.kernels.items()
        )

    @property
    def flops(self) -> int:
        """Of all matrix products, those of attention included."""
        return sum(count * flops for (flops, _), count in self.kernels.items())

    @cached_property
    def _making(self) -> int:
        peak = self._traced().peak
        self._model.zero_grad(set_to_none=True)
        return peak

    @cached_property
    def _adding(self) -> int:
        self._one_pass()
        held = sum(weight.grad.nbytes for weight in self._model.parameters() if weight.grad is not None)
        peak = held + self._traced().peak
        self._model.zero_grad(set_to_none=True)
        return peak

    @cached_property
    def _freeing(self) -> _Trace:
        trained = [weight for weight in self._model.parameters() if weight.requires_grad]
        hooks = [weight.register_post_accumulate_grad_hook(_drop_gradient) for weight in trained]
        trace = self._traced()
        for hook in hooks:
            hook.remove()
        return trace

    def _traced(self) -> _Trace:
        with _Trace(self._vocabulary_size) as trace:
            self._one_pass()
        return trace


def meta_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Build the model of a config as it is trained, without storage."""
    with META:
        model = model_class(config)._from_config(config, dtype=dtype, attn_implementation=attention_of(config))
    return model.to(META).train()  # XLNet makes some of its weights on the CPU


class StepTracer:
    """Traces micro-batches through what is trained.

    Args:
        model: from `meta_model`, or what `put_together` made of several.
        device_type: whose kernels to take where they differ: those of attention and dropout.
        criterion: the loss of a micro-batch.
        document_attention: with the block mask, the larger of the two ways to keep attention within documents.
    """

    def __init__(
        self,
        model: nn.Module,
        device_type: DeviceType,
        criterion: Criterion,
        document_attention: bool = False,
        activation_checkpointing: bool = False,
    ) -> None:
        self._model = model
        self._device_type: DeviceType = device_type
        self._forward, self._criterion = forward_of(model, META, document_attention), criterion
        if activation_checkpointing:
            # A backward pass leaves function modes behind, so what it computes again gets its own.
            contexts = {"context_fn": lambda: (nullcontext(), _KernelsOf(device_type))}
            for each in models_in(model).values():
                each.gradient_checkpointing_enable({"use_reentrant": False, **contexts})

    def trace(self, batch: Batch) -> TracedStep:
        """Describe a micro-batch, of which only the shapes count; it is traced when that is looked at."""
        batch = batch.to(META)
        self._forward.constants(batch.inputs["input_ids"].shape[1])  # are there before the first pass

        def one_pass() -> None:
            with _KernelsOf(self._device_type), positions_run_through():
                loss_sums(self._criterion, self._forward, batch, source_count=1).sum().backward()

        return TracedStep(self._model, one_pass, vocabulary_rows(models_in(self._model)[MAIN]))


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


class _Trace(TorchDispatchMode):
    """Sees every operation, and every storage that one of them makes until it is freed."""

    def __init__(self, vocabulary_size: int) -> None:
        super().__init__()
        self.peak = self.logits_at_peak = 0
        self.kernels: Counter[tuple[int, int]] = Counter()
        self._vocabulary_size = vocabulary_size
        self._live = self._live_logits = 0
        self._sizes: dict[int, tuple[int, bool]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given, made = _tensors((args, kwargs)), _tensors(out)
        known = {_storage_id(tensor) for tensor in given}
        fresh = [tensor for tensor in made if _storage_id(tensor) not in known]
        for tensor in fresh:
            self._born(tensor)
        if self._live > self.peak:
            self.peak, self.logits_at_peak = self._live, self._live_logits
        name = func._schema.name.removeprefix("aten::")
        if (fresh or name.endswith("_")) and name not in _WITHOUT_WORK:
            self.kernels[_flops(func, args, kwargs, out), _moved(name, given, made)] += 1
        return out

    def _born(self, tensor: torch.Tensor) -> None:
        key = _storage_id(tensor)
        if key in self._sizes:
            return
        storage = tensor.untyped_storage()
        # Rows of logits, and not a gradient of the table of tokens, whose first dimension is the vocabulary.
        is_logits = tensor.ndim > 1 and tensor.shape[-1] == self._vocabulary_size
        self._sizes[key] = storage.nbytes(), is_logits
        self._live += storage.nbytes()
        self._live_logits += storage.nbytes() * is_logits
        weakref.finalize(storage, self._died, key)

    def _died(self, key: int) -> None:
        size, is_logits = self._sizes.pop(key)
        self._live -= size
        self._live_logits -= size * is_logits


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _storage_id(tensor: torch.Tensor) -> int:
    """Return a number that is the same for all views of one storage."""
    return tensor.untyped_storage()._cdata


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    packet = func._overloadpacket
    count = flop_registry.get(_COUNTED_AS.get(packet, packet))
    return int(count(*args, **(kwargs or {}), out_val=out)) if count else 0


def _moved(name: str, given: list[torch.Tensor], made: list[torch.Tensor]) -> int:
    written = sum(tensor.nbytes for tensor in made)
    if name in _LOOKUPS:
        return 2 * written
    return written + sum(tensor.nbytes for tensor in given)


class _KernelsOf(TorchFunctionMode):
    """Attention and dropout as a device does them: on meta torch would take the plain ones."""

    def __init__(self, device_type: DeviceType) -> None:
        super().__init__()
        self._is_cuda = device_type == "cuda"

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            return self._attention(func, *args, **kwargs)
        if func is functional.dropout and self._is_cuda:
            return _cuda_dropout(*args, **kwargs)
        return func(*args, **kwargs)

    def _attention(
        self,
        func: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if not self._is_cuda and dropout_p > 0:  # the CPU's flash kernel has no dropout
            return func(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if enable_gqa:
            repeats = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        mask = attn_mask.to(query.dtype) if attn_mask is not None else None
        if not self._is_cuda:
            return _ATEN._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale
            )[0]
        if mask is None and query.dtype in (torch.bfloat16, torch.float16):
            return _ATEN._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
        if mask is not None:
            mask = mask.expand(*query.shape[:3], key.shape[2])
        return _ATEN._scaled_dot_product_efficient_attention(
            query, key, value, mask, True, dropout_p, is_causal, scale=scale
        )[0]


def _cuda_dropout(states: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """Drop out by one kernel and a mask of a byte an element; elsewhere the mask is of the states' own type."""
    return torch.native_dropout(states, p, training)[0] if training and p > 0 else states
