"""The global 2-norm of gradients, read once and without a copy, to 1e-6.

On the CPU torch sums the squares of a tensor one after the other in fp32: over the 13 M elements of an embedding the
norm is 5e-4 too small, and differently so for every cut of ZeRO's partitions. DeepSpeed's remedy is a copy of each
gradient in fp64, at thirty times the cost (docs/performance.md). Here the norms of short rows are taken in fp32, and
only those are summed in fp64. GPUs sum by trees, which are exact enough, and torch has one kernel there for many
tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_ROW = 1024


def sum_of_squares(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum the squares of all elements of tensors on one device.

    Returns:
        fp64 []; NaN or infinite if an element is, or the square of a row.
    """
    if tensors[0].device.type == "cpu":
        norms = torch.cat([part for tensor in tensors for part in _row_norms(tensor)])
    else:
        # What torch.nn.utils.get_total_norm calls, which rounds to the dtype of the tensors.
        norms = torch.stack(torch._foreach_norm(list(tensors), 2, dtype=torch.float32))  # type: ignore[attr-defined]
    return norms.double().square().sum()


def _row_norms(tensor: torch.Tensor) -> list[torch.Tensor]:
    flat = tensor.detach().reshape(-1)
    in_rows = flat.numel() // _ROW * _ROW
    rows = (flat[:in_rows].view(-1, _ROW), flat[in_rows:].unsqueeze(0))
    return [torch.linalg.vector_norm(part, dim=1, dtype=torch.float32) for part in rows if part.numel()]
