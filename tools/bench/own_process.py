"""`python -m tools.bench.own_process MODULE:FUNCTION JSON` runs one repetition of a variant in a process of its own.

The last line on stdout is the Measurement as JSON. See `tools.bench.common.in_own_process`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from importlib import import_module


def main() -> None:
    module, _, name = sys.argv[1].partition(":")
    measured = getattr(import_module(module), name)(**json.loads(sys.argv[2]))
    print(json.dumps(asdict(measured)))


if __name__ == "__main__":
    main()
