"""A model under no engine, which is evaluated as the one that training has under DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from trainer.evaluation.evaluated import EvaluatedNetwork
from trainer.model.build import COMPUTE_DTYPES, fp32_buffers, restore_fp32_buffers
from trainer.model.trained import forward_of


class ModelAtRest:
    """See `trainer.evaluation.evaluated.Evaluated`.

    Args:
        module: in fp32, as `Subject.load` gives it; it becomes the model's own.
        precision: as `train.precision`.
        document_attention: whether attention is kept within documents, where a batch tells of them.
    """

    def __init__(self, module: nn.Module, device: torch.device, precision: str, document_attention: bool) -> None:
        buffers = fp32_buffers(module)
        module.to(COMPUTE_DTYPES[precision])
        restore_fp32_buffers(module, buffers)
        module.to(device).eval().requires_grad_(False)
        self.device = device
        self.network: EvaluatedNetwork = forward_of(module, device, document_attention)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Compute no gradients; dropout is off for good."""
        with torch.no_grad():
            yield
