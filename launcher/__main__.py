"""The console script, and `python -m launcher`: what must hold before anything else of maskwright is imported.

`launcher`, `trainer` and `tools` are common names, and a user's folder may hold a file of any name. So processes that
this one starts do not import from the current folder, and a package of another distribution that has one of the three
names is an error that names it. Nothing but the standard library is imported here at the top.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("launcher", "trainer", "tools")
FIRST_LINE = '"""maskwright: '
"""Of the `__init__.py` of each: pip overwrites such a file without a word when another distribution has one, too."""
EXIT_USER_ERROR = 2  # trainer.errors has it; trainer is what is looked at here


def main() -> None:
    """Run a command."""
    _end_on_interrupt()
    os.environ["PYTHONSAFEPATH"] = "1"
    if (problem := foreign_package()) is not None:
        print(f"Please check: {problem}", file=sys.stderr)
        print("  where:  the Python at " + sys.executable, file=sys.stderr)
        print(
            "  remedy: Install maskwright into an environment of its own (`make setup` makes .venv), or uninstall the "
            "distribution that brings this package.",
            file=sys.stderr,
        )
        raise SystemExit(EXIT_USER_ERROR)
    if sys.argv[1:2] == ["train"]:
        from trainer.runtime.signals import hold_stop_signals

        hold_stop_signals()
    from launcher.cli import main as run_command

    run_command()


def _end_on_interrupt() -> None:
    """Let Ctrl-C end the process quietly as long as there is nothing to save or to clean up.

    Python's own handler would raise wherever an import stands, which not every library survives. A rank of our launcher
    is born with it held back; its death tells the launcher, which speaks for all.
    """
    is_rank = "MASKWRIGHT_ERROR_FILE" in os.environ  # launcher.rank has it
    signal.signal(signal.SIGINT, signal.SIG_DFL if is_rank else _end_at_once)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


def _end_at_once(_number: int, _frame: object) -> None:
    with suppress(OSError):
        os.write(2, b"Interrupted.\n")
    os._exit(128 + signal.SIGINT)


def foreign_package() -> str | None:
    """Say which of maskwright's packages another one hides or has overwritten; None when all are its own."""
    root = Path(__file__).resolve().parent.parent
    for name in PACKAGES:
        spec = find_spec(name)
        if spec is None or spec.origin is None:
            return f"The package '{name}' of maskwright is not there."
        found = Path(spec.origin).resolve()
        if found.parent.parent != root:
            return f"The package '{name}' at {found} hides maskwright's, which is in {root}."
        if not found.read_text(encoding="utf-8").startswith(FIRST_LINE):
            return f"Another distribution has overwritten {found} of maskwright."
    return None


def _leave_current_folder() -> None:
    """Undo what `python -m` does to the path, unless the current folder is the clone that is run."""
    root = Path(__file__).resolve().parent.parent
    if sys.flags.safe_path:
        return
    if Path(sys.path[0]).resolve() == root:  # it need not be installed then, also for the processes that it starts
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(root)]))
    else:
        del sys.path[0]


if __name__ == "__main__":
    _leave_current_folder()
    main()
