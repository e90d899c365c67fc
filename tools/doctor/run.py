"""`maskwright doctor` on one machine."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from tools.doctor.collective import check_all_reduce
from tools.doctor.lines import DoctorReport, Line, checked
from tools.doctor.machine import (
    check_compilers,
    check_devices,
    check_interface,
    check_space,
    check_versions,
    check_writing,
    devices,
    interface,
)
from trainer.config import Config


def examine(config: Config | None) -> DoctorReport:
    """Check this machine, and what a config names if there is one."""
    folder = Path(config.run.dir) if config is not None else Path()
    lines = checked("versions", check_versions)
    if any(line.state == "fail" and line.name == "torch" for line in lines):
        return DoctorReport(lines)
    found = devices()
    lines += checked("devices", partial(check_devices, found))
    lines += checked("compilers", check_compilers)
    lines += checked("disk", partial(check_space, folder))
    lines += checked("writing", partial(check_writing, folder))
    lines += checked("network", lambda: check_interface(interface()))
    lines += checked("all-reduce, gloo", partial(check_all_reduce, "gloo", 2))
    if found:
        lines += checked("all-reduce, nccl", partial(check_all_reduce, "nccl", min(2, len(found))))
    if config is not None:
        lines += checked("config", partial(check_config, config))
    return DoctorReport(lines)


def check_config(config: Config) -> list[Line]:
    """Check the tokenizer, the shards and all else that `validate` looks at."""
    from tools.validate import validate  # with transformers: a node without a config is looked at in half the time

    return [Line("ok", "config", line) for line in validate(config, 1)]
