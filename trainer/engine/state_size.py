"""Bytes of a parameter in memory and in a checkpoint."""

from __future__ import annotations

OPTIMIZER_BYTES = 12  # a parameter: AdamW's two moments and the master weight, in fp32
MOMENT_BYTES = 4  # of which a matrix of Muon has one less
ELEMENTS_AT_ONCE = 1 << 23  # that an optimizer of our own works on together, or one parameter that has more
WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def checkpoint_bytes(parameters: int, stage: int, precision: str, frozen: int = 0, matrices: int = 0) -> int:
    """Count the bytes of a checkpoint's weights and optimizer state, without what little is added to them.

    At stages 1 and 2 the weights in the training precision lie beside the optimizer's own; at stage 0 those are one,
    and at stage 3 DeepSpeed stores the optimizer's alone.

    Args:
        parameters: that are trained.
        frozen: further ones, which lie there in fp32.
        matrices: of those that are trained, the elements of Muon's.
    """
    each = OPTIMIZER_BYTES + (WEIGHT_BYTES[precision] if stage in (1, 2) else 0)
    return parameters * each - MOMENT_BYTES * matrices + 4 * frozen
