"""`python -m tools.bench.own_process MODULE:FUNCTION JSON` runs one repetition of a variant in a process of its own.

The last line on stdout is the Measurement as JSON. See `tools.bench.common.in_own_process`.
"""

from __future__ import annotations

import ctypes
import json
import signal
import sys
from dataclasses import asdict
from importlib import import_module

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    if sys.platform == "linux":  # whatever ends the benchmark, this process does not measure on
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    module, _, name = sys.argv[1].partition(":")
    measured = getattr(import_module(module), name)(**json.loads(sys.argv[2]))
    print(json.dumps(asdict(measured)))


if __name__ == "__main__":
    main()
