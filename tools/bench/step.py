"""`maskwright bench step`: a training step beside Hugging Face's Trainer and beside plain torch loops.

Each variant has processes of its own, one a rank; the variants take turns. All train the same model from the same
weights on the same masked batches, with the same optimizer; only the draws of dropout differ.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tools.bench.common import in_own_processes, take_turns
from tools.bench.step_report import Peaks, StepReport, draw_chart
from tools.bench.step_work import (
    StepMeasurement,
    StepVariant,
    StepWork,
    check_data,
    make_config,
    make_vocabulary,
    make_work_samples,
)
from tools.machine import compile_obstacle, describe_machine
from trainer.config import CUDA_GRAPHS
from trainer.errors import MaskwrightError, UserError, nearest
from trainer.model.hf_config import build_config
from trainer.runtime.rendezvous import LOCALHOST, listen
from trainer.sizing.peak_flops import datasheet_peak, matmul_peak_flops

_MASKED = {"loop": "torch", "masked_head": True}
_LEAN = {**_MASKED, "padding_mask": False}
_OURS = {"loop": "ours", "masked_head": True, "padding_mask": False, "keeps_memory": True, "deepspeed": True}
_ALL = (
    StepVariant("hf", "Hugging Face Trainer", "trainer"),
    StepVariant("hf-fast", "Trainer, attention dropout 0", "trainer", attention_dropout=False),
    StepVariant("hf-compile", "Trainer, torch_compile", "trainer", compiled=True),
    StepVariant("hf-deepspeed", "Trainer, DeepSpeed ZeRO-1", "trainer", deepspeed=True),
    StepVariant("torch", "plain loop, full head", "torch"),
    StepVariant("torch-head", "plain loop, head at predicted positions", **_MASKED),
    StepVariant("torch-masked", "the same, no padding mask", **_LEAN),
    StepVariant("torch-memory", "the same, freed memory kept (CPU)", **_LEAN, keeps_memory=True),
    StepVariant("torch-fast", "the same, attention dropout 0", **_LEAN, keeps_memory=True, attention_dropout=False),
    StepVariant(
        "torch-compile", "the same, compiled", **_LEAN, keeps_memory=True, attention_dropout=False, compiled=True
    ),
    StepVariant("ours", "maskwright, ZeRO-1", **_OURS),
    StepVariant("ours-fast", "maskwright, attention dropout 0", **_OURS, attention_dropout=False),
    StepVariant(
        "ours-compile", "maskwright, attention dropout 0, compiled", **_OURS, attention_dropout=False, compiled=True
    ),
    StepVariant("ours-graphs", "the same, with CUDA graphs", **_OURS, attention_dropout=False, compiled=CUDA_GRAPHS),
    StepVariant("ours-documents", "maskwright, attention within documents", **_OURS, document_attention=True),
    StepVariant("ours-stable", "maskwright, StableAdamW", **_OURS, optimizer="stable_adamw"),
    StepVariant("ours-muon", "maskwright, Muon", **_OURS, optimizer="muon"),
)
VARIANTS = {variant.name: variant for variant in _ALL}
_LADDER = ("torch", "torch-head", "torch-masked", "torch-memory", "torch-fast", "ours-fast", "ours-compile")
GROUPS = {
    "hf": ("hf", "torch-masked", "torch-memory", "ours", "ours-fast"),
    "ladder": _LADDER,
    "all": tuple(variant.name for variant in _ALL if variant.is_the_same_work),
}
"""What `--against` stands for."""
_RATIOS = (
    ("ours", "hf"),
    ("ours-fast", "hf"),
    ("ours", "hf-deepspeed"),
    ("ours-fast", "hf-fast"),
    ("ours-compile", "hf-compile"),
    ("ours", "torch"),
    ("ours", "torch-masked"),
    ("ours", "torch-memory"),
    ("ours-fast", "torch-fast"),
    ("ours-compile", "torch-compile"),
    ("ours-graphs", "ours-compile"),
    ("ours-documents", "ours"),
    ("ours-stable", "ours"),
    ("ours-muon", "ours"),
)
# Without dropout all variants compute the same, up to the order of sums; with it, each has its own draws.
_EXACT_BOUND, _HALF_BOUND, _DROPOUT_BOUND = 1e-4, 0.05, 0.1


@dataclass(frozen=True)
class StepBenchmark:
    """What `bench step` is asked to measure.

    Attributes:
        variants: names; they take turns in this order.
        threads: of torch in each rank; None shares out the cores.
        check_losses: dropout 0 for all, so that losses must be equal.
        chart: PNG file for a bar chart.
        markdown: file for the tables.
    """

    variants: tuple[str, ...] = GROUPS["hf"]
    work: StepWork = field(default_factory=StepWork)
    rounds: int = 3
    threads: int | None = None
    check_losses: bool = False
    chart: str | None = None
    markdown: str | None = None


def bench_step(settings: StepBenchmark, console: Console) -> StepReport:
    """Measure the variants, in turns.

    Raises:
        UserError: for a variant that does not exist, a model or data that do not fit, a file that cannot be written.
        MaskwrightError: when a variant fails.
    """
    variants = chosen_variants(settings.variants)
    _check_writable("--markdown", settings.markdown)
    _check_writable("--chart", settings.chart)
    machine = describe_machine(with_gpus=True)  # before: the load is then that of others
    threads = settings.threads or max(1, machine["cores"] // settings.work.ranks)
    work = replace(settings.work, threads=threads, dropout=0.0 if settings.check_losses else settings.work.dropout)
    config = make_config(work, variants[0])
    build_config(config.model, make_vocabulary(work), work.seq_len)  # what it refuses is better refused now
    check_data(work, make_work_samples(work, config))
    peaks = Peaks(
        **in_own_processes(f"{__name__}:measure_peaks", {"work": asdict(work)}, environments(work, variants[0])[:1])
    )
    turns = {variant.name: _turn(work, variant) for variant in variants}
    report = StepReport(
        settings={**asdict(work), "rounds": settings.rounds, "check_losses": settings.check_losses},
        machine=machine,
        peaks=peaks,
        variants=variants,
        measurements=take_turns("step", turns, settings.rounds, console),
        compared=_compared(variants),
        loss_bound=_loss_bound(work),
    )
    if settings.markdown is not None:
        Path(settings.markdown).write_text(report.to_markdown(), encoding="utf-8")
    if settings.chart is not None:
        draw_chart(report, Path(settings.chart))
    return report


def require_equal_losses(report: StepReport) -> None:
    """Raise MaskwrightError when the variants do not do the same work."""
    if not report.losses_agree:
        raise MaskwrightError(
            f"The variants' losses differ by up to {report.loss_difference:.2g}, more than {report.loss_bound:g}, from "
            f"step {report.parting_step} on.",
            where=", ".join(variant.name for variant in report.variants),
            remedy="They train the same model on the same batches; `--json` has all their losses.",
        )


def _check_writable(option: str, file: str | None) -> None:
    """Raise UserError now for a file that could not be written when all has been measured."""
    if file is None:
        return
    path = Path(file)
    is_new = not path.exists()
    try:
        with path.open("ab"):
            pass
        if is_new:
            path.unlink()
    except OSError as error:
        raise UserError(
            f"Cannot write '{file}': {error.strerror}.",
            where=f"{option} {file}",
            remedy="Give a file in a folder that exists and that you may write to.",
        ) from None


def members(group: str, console: Console) -> tuple[str, ...]:
    """Find the variants of a group that can be measured on this machine, and say what is left out."""
    cuda = torch.cuda.is_available()
    lacking = compile_obstacle(cuda)
    obstacles = {}
    for variant in (VARIANTS[name] for name in GROUPS[group]):
        if variant.compiled and lacking is not None:
            obstacles[variant.name] = lacking
        elif variant.compiled == CUDA_GRAPHS and not cuda:
            obstacles[variant.name] = "CUDA graphs need a GPU"
    for name, obstacle in obstacles.items():
        console.print(f"without {name}: {obstacle}")
    return tuple(name for name in GROUPS[group] if name not in obstacles)


def default_precision() -> str:
    """Name the precision that one trains in on the devices of this machine."""
    return "bf16" if torch.cuda.is_available() else "fp32"


def default_steps() -> tuple[int, int]:
    """Return how many steps are timed, and how many go before them.

    On a GPU steps are short, and its clocks take a while to settle.
    """
    return (50, 10) if torch.cuda.is_available() else (8, 2)


def chosen_variants(names: Sequence[str]) -> list[StepVariant]:
    """Find the variants of some names, each once."""
    for name in names:
        if name not in VARIANTS:
            raise UserError(
                f"No variant '{name}'.{nearest(name, list(VARIANTS))}",
                where=f"--variants {','.join(names)}",
                remedy=f"Known are {', '.join(VARIANTS)}.",
            )
    return [VARIANTS[name] for name in dict.fromkeys(names)]


def measure_peaks(work: dict[str, Any]) -> Peaks:
    """Measure what the device does at best, by a matmul, and find the data sheet's figure where it is known."""
    given = StepWork(**work)
    torch.set_num_threads(given.threads)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    dtype = torch.bfloat16 if given.precision == "bf16" else torch.float32
    datasheet, name = None, f"CPU, {given.threads} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        datasheet = datasheet_peak(name, given.precision)
    return Peaks(name, matmul_peak_flops(device, dtype, seconds=2.0), datasheet)


def _turn(work: StepWork, variant: StepVariant) -> Callable[[], StepMeasurement]:
    arguments = {"work": asdict(work), "variant": asdict(variant)}

    def run() -> StepMeasurement:
        found = in_own_processes("tools.bench.step_run:run_variant", arguments, environments(work, variant))
        return StepMeasurement(**found)

    return run


def environments(work: StepWork, variant: StepVariant) -> list[dict[str, str]]:
    """Make the environment variables of each rank, with a free port to meet at.

    Hugging Face's Trainer on one rank gets what its user would give it, no place among ranks: with one, accelerate
    wraps the model in DistributedDataParallel on GPUs, which costs a pass over the gradients and breaks compiled
    graphs. It gets one GPU, since it would spread over all that it sees.
    """
    common = {
        "OMP_NUM_THREADS": str(work.threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if work.ranks == 1 and variant.loop == "trainer" and not variant.deepspeed:
        return [{**common, "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]}]
    with listen() as listener:
        port = listener.getsockname()[1]
    common |= {
        "MASTER_ADDR": LOCALHOST,
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(work.ranks),
        "LOCAL_WORLD_SIZE": str(work.ranks),
    }
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(work.ranks)]


def _compared(variants: Sequence[StepVariant]) -> list[tuple[str, str]]:
    """List the pairs of variants whose ratio is told: the usual ones, each rung of the ladder over the one below."""
    names = [variant.name for variant in variants]
    rungs = [name for name in _LADDER if name in names]
    pairs = [*_RATIOS, *((above, below) for below, above in itertools.pairwise(rungs))]
    return [pair for pair in dict.fromkeys(pairs) if set(pair) <= set(names)]


def _loss_bound(work: StepWork) -> float:
    if work.dropout != 0.0:
        return _DROPOUT_BOUND
    return _EXACT_BOUND if work.precision == "fp32" else _HALF_BOUND
