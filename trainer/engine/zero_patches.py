"""What DeepSpeed's optimizers do amiss in a step; the arithmetic stays theirs.

ZeRO 1 and 2 do things without need, which are left out. Each of these is a pass over all gradients, or a wait for the
device:

- **Clipping** multiplies the gradients, after looking whether the norm is finite once more for each optimizer group.
  torch's fused AdamW divides by a scale as it reads them, and takes it from the device; the optimizers of our own do
  too.
- **The check for overflow** reads all gradients, and waits, before the norm is computed, which is finite only if they
  are. (Without the check DeepSpeed skips steps by the norm alone, in fp32 as it is.)
- **The reduction of one rank** copies the gradients into a bucket, divides by one and copies them back.
- **The norm** is taken of a copy in fp64 (`trainer.engine.grad_norm` says why, and does without).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed

from trainer.engine.grad_norm import sum_of_squares


def patch_zero_optimizer(zero: Any, optimizer: torch.optim.Optimizer, ranks: int) -> None:
    """Replace the methods of one optimizer of DeepSpeed.

    Args:
        zero: a DeepSpeedZeroOptimizer of stage 1 or 2 that does not offload.
        optimizer: which it wraps, and which divides by `grad_scale`: torch's AdamW, fused, or one of ours.
    """
    zero.check_overflow = lambda *_, **__: None

    def divide_in_optimizer(_gradients: Any, norm: torch.Tensor) -> None:
        """Leave the division to the optimizer; norm is that of the gradients times the loss scale."""
        # Filled on the device: a copy of the host's number would wait for all that the device has still to do.
        scale = torch.full((), zero.loss_scale, dtype=torch.float32, device=norm.device)
        if zero.clip_grad > 0:
            scale = scale * (((norm / scale) + 1e-6) / zero.clip_grad).clamp(min=1.0)
        optimizer.grad_scale = scale  # type: ignore[attr-defined]  # torch's GradScaler sets it in the same way

    if zero.clip_grad > 0 or zero.loss_scale != 1.0:
        zero.unscale_and_clip_grads = divide_in_optimizer
    zero.get_grad_norm_direct = lambda gradients, *_, **__: _global_norm(zero, gradients)
    # With fp32 accumulation of bf16 gradients the reduction adds them to the accumulator, whatever the ranks.
    if ranks == 1 and not zero.partition_gradients and zero.gradient_accumulation_dtype == zero.dtype:
        zero.reduce_ready_partitions_and_remove_grads = lambda *_: None


def forget_skipped_gradients(zero: Any) -> None:
    """Have a skipped step's gradients let go of under offload as without it.

    With fp32 accumulation of bf16 gradients DeepSpeed keeps the buffer of a step that it skips, and adds those of the
    next one to it: after one NaN every step is skipped.

    Args:
        zero: a DeepSpeedZeroOptimizer of stage 1 or 2 that offloads.
    """
    reset = zero.reset_cpu_buffers  # which each step ends with, skipped or not

    def reset_and_forget() -> None:
        reset()
        zero.averaged_gradients.update(dict.fromkeys(zero.averaged_gradients))

    zero.reset_cpu_buffers = reset_and_forget


def raise_scale_after_step(zero: Any) -> Callable[[], None]:
    """Have fp16's loss scale raised after a step; returns what to call then.

    DeepSpeed raises it within the step, between the norm and the division of the gradients, which on that step are
    divided by twice what they were multiplied with. A scale that falls falls at once: the step is skipped.

    Args:
        zero: an optimizer of DeepSpeed of any stage.
    """
    update_scale, is_due = zero._update_scale, False

    def postpone(has_overflow: bool = False) -> None:
        nonlocal is_due
        if has_overflow:
            update_scale(True)
        else:
            is_due = True

    def raise_scale() -> None:
        nonlocal is_due
        if is_due:
            update_scale(False)
        is_due = False

    zero._update_scale = postpone
    return raise_scale


def _global_norm(zero: Any, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Compute the 2-norm, fp32 [], of one optimizer group on all ranks, or -1, DeepSpeed's sign of one not finite.

    Args:
        gradients: this rank's share.
    """
    own = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
    total = sum_of_squares(own) if own else torch.zeros((), dtype=torch.float64, device=zero.device)
    torch.distributed.all_reduce(total, group=zero.dp_process_group)
    norm = total.sqrt().float()
    return torch.where(norm.isfinite(), norm, -1.0)
