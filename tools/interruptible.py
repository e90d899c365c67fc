"""Work in a library that does not see Ctrl-C: in a thread, so that the one that gets signals is free to act on them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

_TICK_SECONDS = 0.2
_GRACE_SECONDS = 2.0


def run_interruptibly(work: Callable[[threading.Event], Any], tick: Callable[[], None]) -> Any:
    """Run `work` to its end, or to a Ctrl-C.

    Args:
        work: is given an event that asks it to end. Native code that never looks at it is left behind, and ends with
            the process.
        tick: called now and then meanwhile, for progress.

    Returns:
        What `work` returns; what it raises is raised here.
    """
    cancel, outcome = threading.Event(), dict[str, Any]()

    def run() -> None:
        try:
            outcome["value"] = work(cancel)
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=run, name="native work", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(_TICK_SECONDS)
            tick()
    except BaseException:
        cancel.set()
        thread.join(_GRACE_SECONDS)
        raise
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]
