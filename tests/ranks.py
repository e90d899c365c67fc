"""Start real ranks in tests: processes over gloo, forked from a server that has the imports behind it."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import yaml

from tests.forked import fork_workers
from tests.waiting import TIMEOUT_S
from trainer.config import Config
from trainer.config.file import parse_config
from trainer.tracking.jsonl import read_metrics

ON_GPUS = os.environ.get("MASKWRIGHT_GPU_TESTS") == "1"
"""Whether tests see the GPUs of this machine; tests/conftest.py hides them otherwise."""
FORK_SERVER: ForkServerContext = multiprocessing.get_context("forkserver")
"""One for all tests: Python has no more than one in a process."""
FORK_SERVER.set_forkserver_preload(["trainer.train", "tools.prepare.on_demand", "tests.forked", "tests.warm"])
FORK_SERVER.set_forkserver_preload = lambda module_names: None  # type: ignore[method-assign]  # what is tested has one too
EXIT_ERROR = 99
_PORTS = itertools.count(os.getpid())


def train(
    config: Config, world_size: int = 1, resume: str = "auto", dry_run: bool = False, timeout_s: float = TIMEOUT_S
) -> int:
    """Run `trainer.train.run` on every rank; returns the exit code they all ended with."""
    codes = run_ranks(_train, world_size, config, resume, dry_run, timeout_s=timeout_s)
    assert len(set(codes)) == 1, f"ranks ended with different codes: {codes}"
    return codes[0]


def _train(config: Config, resume: str, dry_run: bool) -> int:
    from tools.prepare.on_demand import prepare_raw_text
    from trainer.train import run

    return run(config, resume, dry_run, prepare_raw_text)


def run_ranks(work: Callable[..., int], world_size: int, *arguments: Any, timeout_s: float = TIMEOUT_S) -> list[int]:
    """Call `work(*arguments)` on `world_size` ranks, show what they print, return their exit codes in rank order."""
    with started_ranks(work, world_size, *arguments) as ranks:
        return ranks.wait(timeout_s)


class Ranks:
    """Ranks at work; the exit code of one that a signal ended is the signal's number, negative."""

    def __init__(self, processes: Sequence[BaseProcess], outputs: list[Path]) -> None:
        self.processes, self._outputs = processes, outputs

    def wait(self, timeout_s: float = TIMEOUT_S) -> list[int]:
        """Exit codes in rank order, when all have ended by themselves; fails when one does not in time."""
        deadline = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        assert None not in codes, f"a rank did not end in time: {codes}"
        return [int(code or 0) for code in codes]

    def end_as_the_launcher_does(self) -> list[int]:
        """Exit codes in rank order, after one rank has failed: the others have GRACE_S to end, and are then killed."""
        from launcher.local import GRACE_S

        deadline = time.monotonic() + GRACE_S
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
        for process in self.processes:
            process.join()
        return [int(process.exitcode or 0) for process in self.processes]

    def output(self) -> str:
        """What the ranks have printed so far, in rank order."""
        return "".join(path.read_text(errors="replace") if path.exists() else "" for path in self._outputs)


def allow_fp16() -> None:
    """Runs in a rank: torch computes in fp16 on any CPU, but DeepSpeed wants one that is fast at it."""
    import deepspeed

    type(deepspeed.get_accelerator()).is_fp16_supported = lambda _self: True


@contextmanager
def started_ranks(work: Callable[..., int], world_size: int, *arguments: Any) -> Iterator[Ranks]:
    """Have `work(*arguments)` called on `world_size` ranks; at the end they are killed and what they printed shown."""
    port = free_port()
    scratch = Path(tempfile.mkdtemp(prefix="maskwright-test-"))
    outputs = [scratch / f"rank-{rank}" for rank in range(world_size)]
    # Once a process has looked for GPUs, CUDA cannot be used in what is forked from it.
    context = multiprocessing.get_context("spawn") if ON_GPUS else FORK_SERVER
    processes = [
        context.Process(target=_rank, args=(work, rank, world_size, port, outputs[rank], arguments))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    ranks = Ranks(processes, outputs)
    try:
        yield ranks
    finally:
        for process in processes:
            process.kill()
            process.join()
        print(ranks.output(), end="")
        shutil.rmtree(scratch)


def _rank(
    work: Callable[..., int], rank: int, world_size: int, port: int, output: Path, arguments: tuple[Any, ...]
) -> None:
    import traceback

    import torch

    from trainer.errors import MaskwrightError

    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)  # the fork server has pytest's old streams
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    gc.freeze()  # what was imported is there for good: to look through it takes half a second each time
    fork_workers()
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        code = work(*arguments)
    except MaskwrightError as error:
        print(f"rank {rank}: {error}", flush=True)
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
        code = EXIT_ERROR
    os._exit(code)


def free_port() -> int:
    """Find a port that nobody has, and that nobody is given before it is used.

    It is above those of jobs of SLURM, and below those that the kernel gives away; each worker of a run of tests has
    100 of its own, and begins with another one of them than the workers of other runs.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = 30_000 + worker % 27 * 100
    while True:
        port = first + next(_PORTS) % 100
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


TINY_ROBERTA = {
    "hidden_size": 32,
    "num_hidden_layers": 1,  # most of a step of so small a model are ZeRO-3's calls for each module
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 34,
}
WITHOUT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TWO_LAYERS = {**TINY_ROBERTA, **WITHOUT_DROPOUT, "num_hidden_layers": 2}


ADDING = {"batch": {"micro_size": 2}}
"""A section: a rank of two adds up two micro-batches a step."""


def tiny_config(workspace: Path, run_dir: Path, **sections: dict[str, Any] | str) -> Config:
    """A config that trains a tiny RoBERTa on the workspace's data; `sections` are merged over the defaults.

    One rank adds up two micro-batches a step, and one of two takes one: ADDING is for tests where two have to add up.
    """
    raw: dict[str, Any] = {
        "run": {"dir": str(run_dir), "seed": 3},
        "model": {
            "preset": "roberta-base",
            "tokenizer": str(workspace / "tokenizer"),
            "overrides": {**TINY_ROBERTA, **WITHOUT_DROPOUT},
        },
        "data": {"train": str(workspace / "data"), "seq_len": 32, "workers": 0, "chunk_blocks": 8, "window_chunks": 4},
        "batch": {"global_size": 8, "micro_size": 4},
        "optimizer": {"lr": 5.0e-3},
        "schedule": {"warmup_steps": 4},
        "train": {"steps": 20, "precision": "fp32"},
        "checkpoint": {"every_steps": None},
        "eval": {"every_steps": None},
        "logging": {"every_steps": 1, "tensorboard": False},
    }
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section} if isinstance(section, dict) else section
    if "schedule" not in sections and raw["train"].get("steps"):
        raw["schedule"]["warmup_steps"] = min(4, raw["train"]["steps"])
    return parse_config(raw, "test")


def write_config(config: Config, path: Path) -> Path:
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    return path


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return read_metrics(run_dir / "metrics.jsonl")


def losses(run_dir: Path) -> list[float]:
    """Training losses of steps 1, 2, 3, …; fails when a step is missing or doubled."""
    lines = [line for line in metrics(run_dir) if "train/loss" in line]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["train/loss"] for line in lines]
