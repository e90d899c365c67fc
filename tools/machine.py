"""What a figure needs beside it: the machine, its load, and the memory of this process."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trainer.runtime.versions import installed_version

_DRIVER_TIMEOUT_S = 60
PACKAGES = ("numpy", "torch", "tokenizers", "transformers", "datasets", "pyarrow")


def describe_machine(with_gpus: bool = False) -> dict[str, Any]:
    """Read CPU model, usable cores, load average over a minute, memory, and the versions that matter for speed.

    Args:
        with_gpus: also the versions below torch, where it is built for CUDA; imports torch.
    """
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 2),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := installed_version(name))}
        | (_below_torch() if with_gpus else {}),
    }


def machine_line(machine: dict[str, Any]) -> str:
    """Write what `describe_machine` returns on one line."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB, "
        f"load average {machine['load_average']:.2f}; Python {machine['python']}, {versions}"
    )


def _below_torch() -> dict[str, str]:
    """Read the versions of CUDA, cuDNN and NCCL that torch is built for, and of the driver; empty without CUDA."""
    import torch
    from torch.cuda import nccl

    if torch.version.cuda is None:
        return {}
    found = {"CUDA": torch.version.cuda, "cuDNN": str(torch.backends.cudnn.version())}
    if torch.distributed.is_nccl_available():
        found["NCCL"] = ".".join(map(str, nccl.version()))
    if (command := shutil.which("nvidia-smi")) is not None:
        query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
        shown = subprocess.run(query, capture_output=True, text=True, timeout=_DRIVER_TIMEOUT_S).stdout.split()
        found |= {"driver": shown[0]} if shown else {}
    return found


def cpp_compiler() -> str | None:
    """Find the C++ compiler that torch.compile would find on the PATH, for the CPU."""
    return _first_found("c++", "g++", "clang++")


def c_compiler() -> str | None:
    """Find the C compiler that Triton would find on the PATH; it builds the launcher of each kernel with it."""
    own = os.environ.get("CC")
    return _first_found(own) if own else _first_found("gcc", "clang", "cc")


def compile_obstacle(cuda: bool) -> str | None:
    """Say what torch.compile lacks on this machine; None when it has all.

    Args:
        cuda: whether it compiles for GPUs, by Triton, or for the CPU.
    """
    if not cuda:
        return None if cpp_compiler() else "torch.compile needs a C++ compiler"
    if find_spec("triton") is None:
        return "torch.compile needs the package triton on GPUs"
    if c_compiler() is None:
        return "Triton, behind torch.compile, needs a C compiler"
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").is_file():
        return f"Triton, behind torch.compile, needs Python's headers, and {headers / 'Python.h'} is not there"
    return None


def _first_found(*names: str) -> str | None:
    return next((path for path in map(shutil.which, names) if path), None)


def cpu_model() -> str:
    """Name the CPU as the kernel does; give the architecture where the kernel has no name (many ARM machines)."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.machine()


def resident_bytes() -> int:
    """Read the memory of this process now (VmRSS)."""
    return _status_bytes("VmRSS")


def peak_resident_bytes() -> int:
    """Read the most memory that this process has had since it started (VmHWM).

    Not getrusage's ru_maxrss: a process inherits that from the one that started it, however large that was.
    """
    return _status_bytes("VmHWM")


def _status_bytes(name: str) -> int:
    found = re.search(rf"^{name}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, f"/proc/self/status has no {name}"
    return int(found[1]) * 1024
