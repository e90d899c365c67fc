"""What a step is timed against: a GPU by its data sheet, this machine's CPU measured now, or a benchmark's result."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Literal

import torch

from trainer.errors import UserError
from trainer.model.build import COMPUTE_DTYPES
from trainer.runtime.host_memory import available_bytes
from trainer.runtime.paths import user_path
from trainer.runtime.user_files import read_json
from trainer.sizing.meta_trace import DeviceType
from trainer.sizing.peak_flops import datasheet_peak, matmul_peak_flops
from trainer.sizing.zero_memory import CPU_SHARE, GPU_SHARE

DeviceName = Literal["h200", "h100", "a100", "cpu"]
MATMUL_SHARE, MEMORY_SHARE, LINK_SHARE = 0.80, 0.85, 0.80
"""Assumed: what large kernels and collectives reach of a data sheet's figures."""
_GBIT = 1e9 / 8


@dataclass(frozen=True)
class Device:
    """What one rank has; rates are those that the model reckons with, in a second.

    Attributes:
        memory_bytes: all of it.
        usable_bytes: what the model lets a rank take.
        node_bytes, network_bytes: what a rank sends to others on its node, and to other nodes.
        basis: where the figures come from.
    """

    name: str
    kind: DeviceType
    memory_bytes: float
    usable_bytes: float
    flops: float
    memory_bandwidth: float
    node_bytes: float
    network_bytes: float
    basis: str


@dataclass(frozen=True)
class _Sheet:
    """NVIDIA's data sheet: memory in GB, HBM in TB/s, NVLink in GB/s one way; the network port that its DGX has."""

    cuda_name: str
    memory_gb: float
    memory_tb_s: float
    nvlink_gb_s: float
    network_gbit: float


_SHEETS = {
    "h200": _Sheet("NVIDIA H200", 141, 4.8, 450, 400),
    "h100": _Sheet("NVIDIA H100 80GB HBM3", 80, 3.35, 450, 400),
    "a100": _Sheet("NVIDIA A100-SXM4-80GB", 80, 2.039, 300, 200),
}


def find_device(name: DeviceName, precision: str, ranks_per_node: int, network_gbit: float | None) -> Device:
    """Find the device that a plan is for.

    Args:
        network_gbit: of one GPU's port in Gbit/s; None for that of NVIDIA's DGX system or, on CPU, 10.
    """
    if name == "cpu":
        return _this_cpu(precision, ranks_per_node, network_gbit or 10.0)
    sheet = _SHEETS[name]
    peak = datasheet_peak(sheet.cuda_name, precision)
    assert peak is not None, f"{sheet.cuda_name} has no {precision} in the table of data sheets"
    network = network_gbit or sheet.network_gbit
    return Device(
        name=sheet.cuda_name,
        kind="cuda",
        memory_bytes=sheet.memory_gb * 1e9,
        usable_bytes=GPU_SHARE * sheet.memory_gb * 1e9,
        flops=MATMUL_SHARE * peak,
        memory_bandwidth=MEMORY_SHARE * sheet.memory_tb_s * 1e12,
        node_bytes=LINK_SHARE * sheet.nvlink_gb_s * 1e9,
        network_bytes=LINK_SHARE * network * _GBIT,
        basis=f"data sheet: {peak / 1e12:,.0f} TFLOP/s dense {precision}, {sheet.memory_gb:g} GB at "
        f"{sheet.memory_tb_s:g} TB/s, NVLink {sheet.nvlink_gb_s:g} GB/s one way; network {network:g} Gbit/s a GPU; "
        f"of these {MATMUL_SHARE:.0%}, {MEMORY_SHARE:.0%} and {LINK_SHARE:.0%} (links) are assumed to be reached",
    )


def _this_cpu(precision: str, ranks: int, network_gbit: float) -> Device:
    """Measure this machine, whose cores, memory and bandwidth the ranks share."""
    peak = matmul_peak_flops(torch.device("cpu"), COMPUTE_DTYPES[precision])
    copies, memory = _copy_rate(), available_bytes()
    return Device(
        name="this machine's CPU",
        kind="cpu",
        memory_bytes=memory / ranks,
        usable_bytes=CPU_SHARE * memory / ranks,
        flops=peak / ranks,
        memory_bandwidth=copies / ranks,
        node_bytes=copies / ranks / 4,
        network_bytes=LINK_SHARE * network_gbit * _GBIT,
        basis=f"measured now: {peak / 1e9:,.0f} GFLOP/s {precision} matmul, {copies / 1e9:.1f} GB/s copy, "
        f"{memory / 2**30:.1f} GiB available, shared by {ranks} rank{'s' if ranks > 1 else ''}; a quarter of the copy "
        f"rate between ranks and {network_gbit:g} Gbit/s between machines are assumed",
    )


def _copy_rate() -> float:
    """Measure the bytes that a large copy reads and writes a second."""
    source = torch.ones(1 << 25)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best


@dataclass(frozen=True)
class MeasuredStep:
    """The result of `maskwright bench step --json`.

    Attributes:
        flops: model FLOP/s that a rank reached, over whole steps.
        peak_memory_gib: of a rank.
    """

    path: str
    model: str
    micro_size: int
    seq_len: int
    ranks: int
    precision: str
    flops: float
    peak_memory_gib: float | None

    @property
    def basis(self) -> str:
        ranks = f"{self.ranks} rank{'s' if self.ranks > 1 else ''}"
        return (
            f"measured: {self.flops / 1e12:.4g} TFLOP/s a rank in {self.path} ({self.model}, {self.micro_size} × "
            f"{self.seq_len}, {ranks}, {self.precision}), scaled by FLOPs"
        )


def read_bench(path: str, precision: str, device: Device) -> MeasuredStep:
    """Read what a benchmark measured of this program.

    Args:
        device: that the plan is for.

    Raises:
        UserError: when it is no such file, or was measured in another precision or on another kind of device.
    """
    remedy = "Write one with `maskwright bench step --json > FILE` on the device that will train."
    try:
        content = read_json(user_path(path, "--bench"), f"--bench {path}", remedy)
        if content["benchmark"] != "step":
            raise ValueError(f"it is of `bench {content['benchmark']}`")
        if "ours" not in content["variants"]:
            raise ValueError("the variant ours is not in it")
        settings, ours, measured_on = content["settings"], content["variants"]["ours"], content["peaks"]["device"]
        measured = MeasuredStep(
            path=path,
            model=str(settings["model"]),
            micro_size=int(settings["micro_size"]),
            seq_len=int(settings["seq_len"]),
            ranks=int(settings["ranks"]),
            precision=str(settings["precision"]),
            flops=float(ours["tokens_per_second"]) * float(ours["flops_per_token"]) / int(settings["ranks"]),
            peak_memory_gib=ours.get("peak_memory_gib"),
        )
        if not (math.isfinite(measured.flops) and measured.flops > 0):
            raise ValueError(f"its speed is {measured.flops:g} FLOP/s")
    except (ValueError, KeyError, TypeError, ZeroDivisionError, OverflowError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        problem = f"'{path}' is not a result of `maskwright bench step --json`: {reason}."
        raise UserError(problem, where=f"--bench {path}", remedy=remedy) from None
    if str(measured_on).startswith("CPU") != (device.kind == "cpu"):
        raise UserError(
            f"'{path}' was measured on {measured_on}, and the plan is for {device.name}.",
            where=f"--bench {path}",
            remedy="Name the measured device by --device, or measure on the one that will train.",
        )
    if measured.precision != precision:
        raise UserError(
            f"'{path}' was measured in {measured.precision}, and the run trains in {precision}.",
            where=f"--bench {path}, train.precision={precision}",
            remedy="Measure again in the precision of the run.",
        )
    return measured


def device_here() -> DeviceName:
    """Find the device of this machine, for a plan that names none: a GPU with a known data sheet, else the CPU."""
    if torch.cuda.is_available():
        found = torch.cuda.get_device_name()
        known: list[DeviceName] = ["h200", "h100", "a100"]
        for name in known:
            if name.upper() in found:
                return name
    return "cpu"
