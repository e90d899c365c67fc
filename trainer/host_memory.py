"""Memory of the host as the C library keeps it: what a step frees, the next one uses again."""

from __future__ import annotations

import ctypes

# malloc.h of glibc
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, instead of giving it back to the kernel; CPU training only.

    glibc maps each block above 32 MiB anew and unmaps it when it is freed, so that the kernel clears the logits and
    activations of every step page by page: a third of a step's CPU time (docs/performance.md). Here they come from
    the heap, one for all threads, which never shrinks. The process's peak is what it holds from then on; other C
    libraries are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_ARENA_MAX, 1)):
            mallopt(option, value)
