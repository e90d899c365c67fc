"""What is worth knowing of a precision on the device of a run, in lines at the start."""

from __future__ import annotations

import torch


def precision_notes(precision: str, device: torch.device) -> list[str]:
    """Make lines on the precision for the console; most runs have none."""
    if device.type != "cuda":
        return []
    if precision == "fp32":
        return ["fp32: exact matrix products, without TF32; by data sheets bf16 is several times as fast"]
    # torch says yes to every GPU that can emulate it (V100, T4).
    if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return ["bf16: THIS GPU CANNOT COMPUTE IN IT, and emulates it slowly: set train.precision=fp16"]
    return []
