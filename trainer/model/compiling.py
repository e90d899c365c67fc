"""What torch.compile has to be told: how many graphs a run needs, and which attention kernel they are made for."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch._dynamo
import torch.compiler.config

from trainer.config import AUTOTUNE

logger = logging.getLogger(__name__)
_OTHER_GRAPHS = 8  # torch's own limit: room for what is not a shape, such as the parts of a model with graph breaks


def expect_shapes(count: int) -> None:
    """Let each function of the model be compiled for `count` shapes, and say loudly when that is not enough.

    Dynamo's limit holds for a code object, and so for all shapes, and all engines, of a process together. Past it a
    model is computed eagerly, at half the speed, with a line in the log only.
    """
    torch._dynamo.config.recompile_limit = count + _OTHER_GRAPHS
    watched = logging.getLogger("torch._dynamo.convert_frame")
    if not any(isinstance(handler, _LimitWatch) for handler in watched.handlers):
        watched.addHandler(_LimitWatch(logging.WARNING))


def compile_options(mode: bool | str) -> dict[str, Any]:
    """Return the arguments of torch.compile for a value of `model.compile`; shapes are static."""
    if mode is True:
        return {"dynamic": False}
    # torch's plain max-autotune has CUDA graphs, too, and those cannot accumulate.
    return {"dynamic": False, "mode": "max-autotune-no-cudagraphs" if mode == AUTOTUNE else mode}


def forget_graphs() -> None:
    """Let go of all that was compiled in this process, and of the module that Dynamo's caches hold."""
    torch._dynamo.reset()


@contextmanager
def compiled_for_attention(backend: str) -> Iterator[None]:
    """Keep what is compiled here apart, in the process and on the disk, from what is compiled for other backends.

    Inductor settles the kernel of attention while it traces, and neither its guards nor the key of its cache know of
    that (pytorch#185449): without a tag a run would get the kernel of whoever compiled first.
    """
    before = torch.compiler.config.cache_key_tag
    torch.compiler.config.cache_key_tag = f"attention={backend}"
    forget_graphs()
    try:
        yield
    finally:
        torch.compiler.config.cache_key_tag = before


class _LimitWatch(logging.Handler):
    """Says on the console what Dynamo says in the log alone."""

    def emit(self, record: logging.LogRecord) -> None:
        if "recompile_limit" in record.getMessage():
            logger.warning(
                "COMPILE LIMIT REACHED: torch.compile has given up on a part of the model, which is now computed "
                "eagerly and slower; the log has its reason (%s)",
                record.getMessage().splitlines()[0],
            )
