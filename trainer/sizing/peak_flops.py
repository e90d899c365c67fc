"""What a device can do at best: the denominator of MFU."""

from __future__ import annotations

import math
import re
import time

import torch

# NVIDIA's data sheets: dense Tensor-Core TFLOP/s (half of the figure "with sparsity"), fp32 outside Tensor Cores.
# The first pattern that is found in the CUDA device name counts, so the special cases come first.
_DATASHEET: tuple[tuple[str, dict[str, float]], ...] = (
    (r"GB200", {"bf16": 2500.0, "fp16": 2500.0, "tf32": 1250.0, "fp32": 80.0}),
    (r"B200", {"bf16": 2250.0, "fp16": 2250.0, "tf32": 1100.0, "fp32": 75.0}),
    (r"H[12]00 NVL", {"bf16": 835.5, "fp16": 835.5, "tf32": 417.5, "fp32": 60.0}),
    (r"H100 PCIe", {"bf16": 756.0, "fp16": 756.0, "tf32": 378.0, "fp32": 51.0}),
    (r"GH200|H200|H100", {"bf16": 989.4, "fp16": 989.4, "tf32": 494.7, "fp32": 66.9}),
    (r"A100", {"bf16": 312.0, "fp16": 312.0, "tf32": 156.0, "fp32": 19.5}),
    (r"A40\b", {"bf16": 149.7, "fp16": 149.7, "tf32": 74.8, "fp32": 37.4}),
    (r"A30\b", {"bf16": 165.0, "fp16": 165.0, "tf32": 82.0, "fp32": 10.3}),
    (r"A10\b", {"bf16": 125.0, "fp16": 125.0, "tf32": 62.5, "fp32": 31.2}),
    (r"L40S", {"bf16": 362.05, "fp16": 362.05, "tf32": 183.0, "fp32": 91.6}),
    (r"L40\b", {"bf16": 181.05, "fp16": 181.05, "tf32": 90.5, "fp32": 90.5}),
    (r"L4\b", {"bf16": 121.0, "fp16": 121.0, "tf32": 60.0, "fp32": 30.3}),
    (r"V100-PCIE", {"fp16": 112.0, "fp32": 14.0}),
    (r"V100", {"fp16": 125.0, "fp32": 15.7}),
    (r"T4\b", {"fp16": 65.0, "fp32": 8.1}),
)
_FORMATS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def device_peak(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Find the dense matmul peak of a device in FLOP/s, and where the figure comes from; NaN for a CPU.

    NVIDIA's data sheet for the GPUs it knows by name; for other GPUs and MIG slices a measured matmul. fp32 counts as
    TF32 where torch is allowed to use it. A CPU is on no data sheet, and what a start could measure in passing is the
    load of that moment: a run whose machine was busy when it began was told that it used 155 % of it.
    """
    if device.type == "cpu":
        return math.nan, "a CPU: its peak is not known"
    if device.type == "cuda":
        tf32 = dtype is torch.float32 and torch.get_float32_matmul_precision() != "highest"
        name = torch.cuda.get_device_name(device)
        peak = datasheet_peak(name, "tf32" if tf32 else _FORMATS.get(dtype, str(dtype)))
        if peak is not None:
            return peak, f"{name}, {'tf32' if tf32 else _FORMATS[dtype]} dense data-sheet peak"
    return matmul_peak_flops(device, dtype), f"measured matmul on {device.type}, {_FORMATS.get(dtype, str(dtype))}"


def datasheet_peak(name: str, number_format: str) -> float | None:
    """Look up FLOP/s from the data sheet for a CUDA device name; None where the table has no entry."""
    if "MIG" in name:
        return None
    for pattern, teraflops in _DATASHEET:
        if re.search(rf"\b(?:{pattern})", name):
            peak = teraflops.get(number_format)
            return None if peak is None else peak * 1e12
    return None


def matmul_peak_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Measure the best rate of square matmuls on this device in FLOP/s, within about `seconds`.

    The size doubles while time is left, from 512 to 8,192 on a GPU and to 2,048 elsewhere. A smaller one says little of
    a device: on a busy machine its threads may wait for each other a hundred times as long as they compute.
    """
    # The library's set-up may take longer than all the rest: the rate would be that of the set-up.
    _matmul_seconds(torch.randn(128, 128, device=device, dtype=dtype))
    deadline = time.perf_counter() + seconds
    largest = 8192 if device.type == "cuda" else 2048
    best, size = 0.0, 512
    while size <= largest:
        left = torch.randn(size, size, device=device, dtype=dtype)  # with ones a GPU draws less power and clocks higher
        rates = []
        for _ in range(4):
            elapsed = _matmul_seconds(left)
            rates.append(2 * size**3 / elapsed)
            if time.perf_counter() + 8 * elapsed > deadline:
                break
        best = max(best, *rates) if rates else best
        if time.perf_counter() + 4 * 8 * (2 * size**3 / best) > deadline:
            break  # the next size would not fit
        size *= 2
    return best


def _matmul_seconds(left: torch.Tensor) -> float:
    if left.device.type == "cuda":
        torch.cuda.synchronize(left.device)
    start = time.perf_counter()
    torch.mm(left, left)
    if left.device.type == "cuda":
        torch.cuda.synchronize(left.device)
    return time.perf_counter() - start
