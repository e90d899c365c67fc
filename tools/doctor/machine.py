"""Checks of one machine: what is installed, devices, compilers, disk, network interface."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from packaging.requirements import Requirement
from packaging.version import Version

from tools.doctor.lines import Line
from tools.machine import c_compiler, compile_obstacle, cpp_compiler, cpu_model
from tools.prepare.summary import human_bytes
from trainer.runtime.files import shipped, unique_name
from trainer.runtime.record_lock import RecordLock, try_record_lock
from trainer.runtime.versions import installed_version

PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "datasets", "numpy", "pydantic", "tensorboard")
CONSTRAINTS = shipped("tools", "doctor/constraints.txt")
LITTLE_SPACE, TOO_LITTLE_SPACE = 20 << 30, 1 << 30
SMALL_SHARED_MEMORY = 512 << 20
_PROBE_BYTES = 8 << 20
_TOOL_TIMEOUT_S = 30


def versions() -> dict[str, str]:
    """Read the versions of Python and of what training stands on; a package that is missing is left out."""
    known = {name: installed_version(name) for name in ("maskwright", *PACKAGES)}
    return {"python": platform.python_version(), **{name: found for name, found in known.items() if found}}


def check_versions() -> list[Line]:
    """Check the versions against what maskwright needs, and against what was tested together (constraints.txt)."""
    found = versions()
    if "maskwright" not in found:  # and nothing says which versions it needs
        finding = "runs from a folder, and is not installed"
        return [Line("fail", "maskwright", finding, "make setup, or pip install -c constraints.txt -e .")]
    lines = [
        Line("ok", "maskwright", found["maskwright"]),
        Line("ok", "python", f"{found['python']} on {platform.system()} {platform.release()}"),
    ]
    lowest = {
        requirement.name: requirement
        for requirement in map(Requirement, importlib.metadata.requires("maskwright") or ())
        if requirement.marker is None
    }
    tested = _tested_versions()
    for name in PACKAGES:
        requirement = lowest[name]
        if name not in found:
            lines.append(Line("fail", name, "is not installed", "make setup, or pip install -c constraints.txt -e ."))
            continue
        version = Version(found[name])
        if not requirement.specifier.contains(version, prereleases=True):
            remedy = f"pip install -c constraints.txt '{requirement.name}{requirement.specifier}'"
            lines.append(Line("fail", name, f"{version}, and {requirement.specifier} is needed", remedy))
        elif name in tested and Version(version.public) != tested[name]:
            lines.append(
                Line("warn", name, f"{version}; tested with {tested[name]}", "Take the tested one if it fails.")
            )
        else:
            lines.append(Line("ok", name, str(version)))
    return lines


def _tested_versions() -> dict[str, Version]:
    """Read the pins of constraints.txt."""
    text = CONSTRAINTS.read_text(encoding="utf-8")
    return {name: Version(pin) for name, pin in re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE)}


def devices() -> list[dict[str, Any]]:
    """List the CUDA devices, each with name, total and free bytes."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        found.append({"name": torch.cuda.get_device_name(number), "total_bytes": total, "free_bytes": free})
    return found


def check_devices(found: list[dict[str, Any]]) -> list[Line]:
    """Check the GPUs and their free memory; without one, say that training would be on the CPU."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0))
    lines = [Line("ok", "cpu", f"{cpu_model()}, {cores} cores, {human_bytes(memory)} of memory")]
    if not found and shutil.which("nvidia-smi"):
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        remedy = "Install a torch build for the driver's CUDA version; look at nvidia-smi and CUDA_VISIBLE_DEVICES."
        lines.append(
            Line(
                "fail", "gpu", f"there is an NVIDIA driver, but torch {torch.__version__} ({built}) sees no GPU", remedy
            )
        )
    elif not found:
        lines.append(Line("ok", "gpu", "none; training runs on the CPU, over gloo"))
    for number, device in enumerate(found):
        used = device["total_bytes"] - device["free_bytes"]
        finding = f"{device['name']}, {human_bytes(device['free_bytes'])} of {human_bytes(device['total_bytes'])} free"
        if used > 0.1 * device["total_bytes"]:
            lines.append(
                Line("fail", f"gpu {number}", finding, "Another process has its memory: see nvidia-smi, end it.")
            )
        else:
            lines.append(Line("ok", f"gpu {number}", finding))
    if found:
        lines.append(Line("ok", "gpu tests", "`make test-gpu` in a clone shows whether training is right on this GPU"))
    return lines


def check_compilers() -> list[Line]:
    """Check what model.compile needs; and torch's CUDA against that of nvcc, which builds DeepSpeed's own kernels."""
    import torch

    cuda = torch.cuda.is_available()
    compiler, obstacle = c_compiler() if cuda else cpp_compiler(), compile_obstacle(cuda)
    if obstacle is not None:
        wanted = "pip install triton; gcc and python3-dev from the distribution" if cuda else "Install g++"
        lines = [Line("warn", "compiler", obstacle, f"{wanted}, or leave model.compile off.")]
    else:
        assert compiler is not None
        lines = [Line("ok", "compiler", _output(compiler, "--version").partition("\n")[0] or compiler)]
    nvcc = shutil.which("nvcc")
    if torch.version.cuda is None:
        lines.append(Line("ok", "cuda", f"torch {torch.__version__} is built without it"))
    elif nvcc is None:
        lines.append(Line("ok", "cuda", f"torch is built for {torch.version.cuda}; no nvcc, which no preset needs"))
    else:
        lines.append(compare_cuda(torch.version.cuda, _output(nvcc, "--version")))
    return lines


def compare_cuda(of_torch: str, nvcc_output: str) -> Line:
    """Compare torch's CUDA version with that of `nvcc --version`."""
    found = re.search(r"release (\d+\.\d+)", nvcc_output)
    of_nvcc = found[1] if found else "an unknown version"
    finding = f"torch is built for {of_torch}, nvcc is {of_nvcc}"
    if of_nvcc.partition(".")[0] == of_torch.partition(".")[0]:
        return Line("ok", "cuda", finding)
    remedy = "Only kernels that DeepSpeed compiles need both alike: load the CUDA module that torch was built for."
    return Line("warn", "cuda", finding, remedy)


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_TOOL_TIMEOUT_S).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def existing_parent(folder: Path) -> Path:
    """Find the folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def check_space(folder: Path) -> list[Line]:
    """Check the free space of a run and of temporary files, and the size of shared memory, which loader workers use."""
    lines = []
    for name, place in (("disk", existing_parent(folder)), ("temporary files", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(place).free
        state = "fail" if free < TOO_LITTLE_SPACE else "warn" if free < LITTLE_SPACE and name == "disk" else "ok"
        remedy = "Free space there, or give another place: a checkpoint needs 12 to 16 bytes a parameter."
        lines.append(Line(state, name, f"{human_bytes(free)} free in {place}", "" if state == "ok" else remedy))
    memory = Path("/dev/shm")
    if memory.is_dir():
        size = shutil.disk_usage(memory).total
        small = size < SMALL_SHARED_MEMORY
        remedy = "In a container: --shm-size=8g (or --ipc=host); or set data.workers=0." if small else ""
        lines.append(Line("warn" if small else "ok", "shared memory", f"{human_bytes(size)} in {memory}", remedy))
    return lines


def check_writing(folder: Path) -> list[Line]:
    """Write, sync, rename, lock and remove a file, as a run does."""
    place = existing_parent(folder)
    probe = unique_name(place / "doctor")
    renamed = probe.with_suffix(".renamed")
    start = time.perf_counter()
    try:
        with open(probe, "wb") as file:
            file.write(os.urandom(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
            seconds = time.perf_counter() - start
            locks = try_record_lock(file.fileno()) is RecordLock.OURS
        os.replace(probe, renamed)
    except OSError as error:
        remedy = "Give a folder that you may write to, on a file system with free space (see `quota`)."
        return [Line("fail", "writing", f"{place}: {error.strerror}", remedy)]
    finally:
        for path in (probe, renamed):
            path.unlink(missing_ok=True)
    speed = f"{human_bytes(_PROBE_BYTES)} written and synced in {seconds:.2f} s in {place}"
    if not locks:
        remedy = "Nothing, where one job at a time uses a run folder: it is told by signs of life then."
        return [Line("warn", "writing", f"{speed}; the file system has no locks", remedy)]
    return [Line("ok", "writing", speed)]


def interface() -> dict[str, Any]:
    """Find where gloo talks to other machines: the interface it was told, or the one this machine's name leads to.

    Returns:
        `address` (empty: the name has none), `interface` (empty: not one of this machine), `speed_mbit` (None where the
        kernel knows none), `all` (every interface but loopback that is up, and its speed).
    """
    speeds = {name: state.speed or None for name, state in psutil.net_if_stats().items() if state.isup}
    addresses = {
        entry.address.partition("%")[0]: name for name, entries in psutil.net_if_addrs().items() for entry in entries
    }
    name = os.environ.get("GLOO_SOCKET_IFNAME", "").partition(",")[0]
    try:
        address = str(socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        address = ""
    name = name or addresses.get(address, "")
    others = {name: speed for name, speed in speeds.items() if name != "lo"}
    return {"address": address, "interface": name, "speed_mbit": speeds.get(name), "all": others}


def check_interface(found: dict[str, Any]) -> list[Line]:
    """Check whether other machines could reach this one by the address that gloo would tell them."""
    names = ", ".join(f"{name} ({speed:,} Mbit/s)" if speed else name for name, speed in found["all"].items())
    lines = []
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        wanted = os.environ.get(variable, "").lstrip("=").partition(",")[0]
        is_there = not wanted or wanted.startswith("^") or any(name.startswith(wanted) for name in found["all"])
        if not is_there:
            lines.append(Line("fail", variable, f"'{wanted}' is none of {names}", "Unset it, or name one of these."))
        elif wanted:
            lines.append(Line("ok", variable, wanted))
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return lines
    if not found["address"]:
        remedy = "Set GLOO_SOCKET_IFNAME to the interface that the other nodes reach."
        return [
            *lines,
            Line("warn", "network", f"the name of this machine has no address; interfaces: {names}", remedy),
        ]
    if found["address"].startswith("127.") or found["address"] == "::1":
        remedy = "With several nodes, set GLOO_SOCKET_IFNAME to the interface that the others reach."
        finding = (
            f"the name of this machine leads to {found['address']}, which others cannot reach; interfaces: {names}"
        )
        return [*lines, Line("warn", "network", finding, remedy)]
    return [*lines, Line("ok", "network", f"{found['address']}; interfaces: {names}")]
