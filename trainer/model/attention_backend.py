"""Which of torch's kernels computes the attention: the fastest for the run's blocks, measured once and remembered.

torch has several for `scaled_dot_product_attention`. On Hopper GPUs flash and cuDNN are each said to be the faster one,
so they are timed. A choice that is made anew at each start could go either way, and a resume would go on with another
kernel: what the first start found stays in the run folder, for every later one on the same kind of device.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from transformers import PretrainedConfig

from trainer.config import Config, run_folder
from trainer.errors import UserError
from trainer.model.build import COMPUTE_DTYPES
from trainer.model.compiling import compiled_for_attention
from trainer.model.hf_config import attention_dropout_of, head_width_of, heads_of
from trainer.runtime import distributed
from trainer.runtime.distributed import World
from trainer.runtime.tuning_cache import recall, remember

logger = logging.getLogger(__name__)

RECORD = "attention_backend.json"
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
"""By their names in `model.attention_backend`."""
_CANDIDATES = ("flash", "cudnn", "efficient")  # math keeps all S² probabilities: no choice for a GPU
_DETERMINISTIC = ("flash", "math")  # the others add in an order of their own, or refuse to
_WORTH = 0.97  # another than the first that can be used has to take less than this share of its time
_MEASURED_S = 0.2  # for each candidate
_TOLERANCE = {"fp32": 1e-3, "bf16": 3e-2, "fp16": 1e-2}  # of outputs and gradients, over the largest of them


@dataclass(frozen=True)
class AttentionShape:
    """Attention without a mask, as the model computes it in a layer: [batch, heads, seq_len, width]."""

    batch: int
    heads: int
    seq_len: int
    width: int
    dropout: float
    precision: str


def resolve_attention_backend(
    config: Config,
    model_config: PretrainedConfig,
    micro_size: int,
    world: World,
    say: Callable[[str], None],
    keep: bool = True,
) -> str | None:
    """Choose the backend of this run, the same on all ranks; every rank calls it.

    Args:
        keep: remember in the run folder what is found.

    Returns:
        a name in BACKENDS; None where torch's own order stands.

    Raises:
        UserError: on every rank, when the one that the config names cannot be used.
    """
    wanted, shape = config.model.attention_backend, attention_shape(config, model_config, micro_size)
    if config.train.deterministic and world.device.type == "cuda" and model_config._attn_implementation == "sdpa":
        names = _DETERMINISTIC if wanted == "auto" else [wanted]
        backend = distributed.run_on_all_ranks(world, lambda: _first_usable(names, shape, world))
        say(f"attention: the {backend} backend, which is deterministic")
        return backend
    obstacle = _obstacle(config, model_config, world.device)
    if obstacle is not None:
        if wanted != "auto":
            say(f"attention: model.attention_backend={wanted} has no effect: {obstacle}")
        return None
    if wanted != "auto":
        distributed.run_on_all_ranks(world, lambda: _first_usable([wanted], shape, world))
        say(f"attention: the {wanted} backend, as the config says")
        return wanted
    return fastest(config, shape, world, say, keep) if world.device.type == "cuda" else None


def attention_shape(config: Config, model_config: PretrainedConfig, micro_size: int) -> AttentionShape:
    """Return the shape of attention over the run's last blocks."""
    return AttentionShape(
        batch=micro_size,
        heads=heads_of(model_config),
        seq_len=config.data.seq_len,
        width=head_width_of(model_config),
        dropout=attention_dropout_of(model_config),
        precision=config.train.precision,
    )


@contextmanager
def preferring(backend: str | None, device: torch.device) -> Iterator[None]:
    """Prefer this backend for attention, torch's others where it cannot, as with a mask; None leaves torch's order."""
    if backend is None:
        yield
        return
    # At the first call in a process torch puts its own order for the device in the place of any other.
    token = torch.zeros(1, 1, 1, 8, device=device)
    functional.scaled_dot_product_attention(token, token, token)
    # On CPU torch does not look at the order; math, which can compute everything, needs no others behind it.
    others = [name for name in BACKENDS if name != backend] if backend != "math" else []
    if torch.are_deterministic_algorithms_enabled():
        others = [name for name in others if name in _DETERMINISTIC]
    order = [BACKENDS[name] for name in (backend, *others)]
    with sdpa_kernel(order, set_priority=True), compiled_for_attention(backend):
        yield


def measure_backends(shape: AttentionShape, device: torch.device, names: Sequence[str]) -> dict[str, float]:
    """Measure the milliseconds of a layer's forward and backward pass, by each of these backends that is usable."""
    found: dict[str, float] = {}
    attend = _attention_pass(shape, device)
    for name in usable(shape, device, names):
        with _own_random_state(device), sdpa_kernel(BACKENDS[name]):
            timer = Timer("attend()", globals={"attend": attend}, num_threads=torch.get_num_threads())
            found[name] = 1000 * timer.blocked_autorange(min_run_time=_MEASURED_S).median
    return found


def usable(shape: AttentionShape, device: torch.device, names: Sequence[str]) -> list[str]:
    """Find the backends that can compute it and, without dropout, agree with math in fp32, which sums differently.

    cuDNN before 9.15.1 was wrong for some lengths (pytorch#169849).
    """
    found = []
    exact = replace(shape, batch=1, dropout=0.0, precision="fp32")
    with sdpa_kernel(SDPBackend.MATH):
        reference = _attention_pass(exact, device)()
    with _own_random_state(device), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says at length why a backend cannot be used
        for name in names:
            with sdpa_kernel(BACKENDS[name]):
                try:
                    _attention_pass(replace(shape, batch=1), device)()
                    results = _attention_pass(replace(exact, precision=shape.precision), device)()
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError as error:
                    logger.info("attention: %s cannot be used: %s", name, error)
                    continue
            if agree(results, reference, _TOLERANCE[shape.precision]):
                found.append(name)
            else:
                logger.warning("attention: %s gives other results than math, and is not used", name)
    return found


def agree(results: Sequence[torch.Tensor], reference: Sequence[torch.Tensor], tolerance: float) -> bool:
    """Tell whether each tensor differs by no more than this share of the largest element; False for NaN."""
    return all(
        bool((result.float() - right.float()).abs().max() <= tolerance * right.float().abs().max())
        for result, right in zip(results, reference, strict=True)
    )


def choose_backend(milliseconds: dict[str, float]) -> str | None:
    """Choose the fastest, unless it is hardly faster than the first."""
    if not milliseconds:
        return None
    first, fastest = next(iter(milliseconds)), min(milliseconds, key=lambda name: milliseconds[name])
    return fastest if milliseconds[fastest] < _WORTH * milliseconds[first] else first


def fastest(config: Config, shape: AttentionShape, world: World, say: Callable[[str], None], keep: bool) -> str | None:
    """Recall what an earlier start has found on such a device, or let rank 0 find it now; every rank calls it."""
    path = run_folder(config) / RECORD
    # Another micro-batch or number of ranks is no reason to compute otherwise.
    case = {"device": world.device_name, "torch": torch.__version__, **asdict(shape)}
    del case["batch"]

    def find() -> dict[str, Any]:
        times = measure_backends(shape, world.device, _CANDIDATES)
        record = {"case": case, "milliseconds": times, "backend": choose_backend(times)}
        if keep:
            remember(path, record)
        return record

    def recall_or_find() -> tuple[str | None, str]:
        known = next((record for record in recall(path) if _is_for(record, case)), None)
        record = known or find()
        return record["backend"], _describe(record, None if known is None else path)

    found = distributed.run_on_all_ranks(world, lambda: recall_or_find() if world.is_main else None)
    backend, line = distributed.broadcast_from_main(world, found)
    say(line)
    return backend


def _is_for(record: dict[str, Any], case: dict[str, Any]) -> bool:
    backend = record.get("backend", "")
    return record.get("case") == case and (backend is None or (isinstance(backend, str) and backend in BACKENDS))


def _describe(record: dict[str, Any], path: Path | None) -> str:
    """Say which backend is used, and how that is known.

    Args:
        path: of the record, when an earlier start has made it.
    """
    backend = record["backend"]
    if backend is None:
        return "attention: torch's choice: none of its fast backends can compute it"
    if path is not None:
        return f"attention: the {backend} backend, as in an earlier start ({path})"
    times = ", ".join(f"{name} {value:.3g} ms" for name, value in record["milliseconds"].items())
    return f"attention: the {backend} backend, by measurement of a layer, forward and backward: {times}"


def _own_random_state(device: torch.device) -> AbstractContextManager[None]:
    """Keep draws of dropout from leaving a trace in the run's random state."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def _attention_pass(shape: AttentionShape, device: torch.device) -> Callable[[], Sequence[torch.Tensor]]:
    """Make a forward and backward pass: (output, gradients of query, key and value) from the same numbers each time."""
    size = (shape.batch, shape.seq_len, shape.heads, shape.width)
    generator = torch.Generator(device).manual_seed(0)
    leaves = [
        torch.randn(size, generator=generator, device=device).to(COMPUTE_DTYPES[shape.precision]).requires_grad_()
        for _ in range(3)
    ]

    def attend() -> Sequence[torch.Tensor]:
        query, key, value = (leaf.transpose(1, 2) for leaf in leaves)  # as models have them
        output = functional.scaled_dot_product_attention(query, key, value, dropout_p=shape.dropout)
        return output, *torch.autograd.grad(output, leaves, output.detach())

    return attend


def _first_usable(names: Sequence[str], shape: AttentionShape, world: World) -> str:
    found = next((name for name in names if usable(shape, world.device, [name])), None)
    if found is None:
        raise UserError(
            f"The {names[0]} backend of torch's attention cannot be used for {shape.precision}, heads of {shape.width} "
            f"and attention dropout {shape.dropout:g} on {world.device_name}.",
            where=f"model.attention_backend={names[0]}",
            remedy="Set model.attention_backend=auto.",
        )
    return found


def _obstacle(config: Config, model_config: PretrainedConfig, device: torch.device) -> str | None:
    """Say why the model does not call torch's attention without a mask; None when it does."""
    implementation = model_config._attn_implementation
    if implementation != "sdpa":
        return f"this model's attention is {implementation}"
    if config.model.document_attention:
        return "attention within documents has a kernel of its own, or a mask"
    if device.type == "cpu" and attention_dropout_of(model_config):
        return "on CPU attention with dropout is maskwright's own"
    return None
