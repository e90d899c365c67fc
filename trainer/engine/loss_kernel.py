"""Which kernel computes the cross-entropy of the training step: DeepSpeed's in Triton, or torch's.

torch's way goes over the logits of all predictions several times and holds their probabilities in fp32. DeepSpeed's
kernel (`deepspeed.runtime.chunked_cross_entropy`) reads them once forward and once backward, and holds their gradient
in the precision of the logits. Each row is summed by one program in one order, so the same logits give the same bits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from trainer.config import Config
from trainer.data.blocks import IGNORED_LABEL
from trainer.errors import UserError
from trainer.model.build import COMPUTE_DTYPES
from trainer.objectives.cross_entropy import CrossEntropies, cross_entropies
from trainer.runtime import distributed
from trainer.runtime.distributed import World

logger = logging.getLogger(__name__)
_ROWS = 5  # of the check, one of them without a label
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # of a gradient, whose dtype rounds it


def resolve_loss_kernel(
    config: Config, classes: int, world: World, say: Callable[[str], None] = logger.info
) -> CrossEntropies:
    """Choose what computes the losses of this run, the same on all ranks; every rank calls it.

    Args:
        classes: how many logits a row of the check has.
        say: gets a line where there was a choice.

    Raises:
        UserError: on every rank, when the config asks for Triton and the kernel cannot be used on one of them.
    """
    wanted = config.model.kernels
    if wanted == "torch" or (wanted == "auto" and world.device.type != "cuda"):
        return cross_entropies
    own = distributed.run_on_all_ranks(
        world, lambda: obstacle(classes, COMPUTE_DTYPES[config.train.precision], world.device)
    )
    reason = next((each for each in distributed.all_gather(world, own) if each), None)
    if reason is None:
        say("cross-entropy: the Triton kernel, which agrees with torch's here")
        return triton_cross_entropies
    if wanted == "triton":
        raise UserError(
            f"The Triton kernel of the cross-entropy cannot be used: {reason}.",
            where="model.kernels=triton",
            remedy="Set model.kernels=auto, which takes torch's then.",
        )
    say(f"cross-entropy: torch's, for the Triton kernel cannot be used: {reason}")
    return cross_entropies


def triton_cross_entropies(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Compute what `trainer.objectives.cross_entropy.cross_entropies` does, by DeepSpeed's kernel.

    Raises:
        RuntimeError: without a GPU that Triton knows.
    """
    from deepspeed.runtime.chunked_cross_entropy import chunked_cross_entropy

    return chunked_cross_entropy(logits, labels, IGNORED_LABEL, reduction="none", backend="triton")


def obstacle(classes: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Find why the kernel cannot be used on this device, by using it; None when it agrees with torch's."""
    if device.type != "cuda" and not _is_interpreted():
        return "it needs a GPU"
    generator = torch.Generator(device).manual_seed(0)
    logits = (4 * torch.randn(_ROWS, classes, generator=generator, device=device)).to(dtype)
    labels = torch.randint(classes, (_ROWS,), generator=generator, device=device)
    labels[1] = IGNORED_LABEL
    try:
        found = _losses_and_gradient(triton_cross_entropies, logits, labels)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of Triton, its compiler, the C compiler or the driver: each has kinds of its own
        logger.info("cross-entropy: the Triton kernel cannot be used", exc_info=True)
        return " ".join(f"{type(error).__name__}: {error}".split())[:200]
    tolerances = (_TOLERANCE[torch.float32], _TOLERANCE[dtype])
    expected = _losses_and_gradient(cross_entropies, logits, labels)
    for result, right, tolerance in zip(found, expected, tolerances, strict=True):
        if not bool((result - right).abs().max() <= tolerance * right.abs().max()):
            return "it gives other results than torch"
    return None


def _losses_and_gradient(
    function: CrossEntropies, logits: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute both in fp32, the gradient as that of a sum with another weight for each row."""
    leaf = logits.clone().requires_grad_()
    losses = function(leaf, labels)
    weights = torch.arange(1, len(losses) + 1, device=losses.device)
    (gradient,) = torch.autograd.grad((losses * weights).sum(), leaf)
    return losses.detach(), gradient.float()


def _is_interpreted() -> bool:
    """Tell whether Triton runs its kernels step by step in Python (TRITON_INTERPRET=1), on any device."""
    try:
        from triton import knobs
    except ImportError:
        return False
    return bool(knobs.runtime.interpret)
