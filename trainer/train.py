"""One rank of a run, wired in reading order: config → inputs → resume → model → engine → checkpoint → loop."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
import yaml

from trainer import distributed
from trainer.checkpoint.commit import Saver
from trainer.checkpoint.contents import read_probe_block, take_contents
from trainer.checkpoint.find import checkpoints_folder, choose
from trainer.checkpoint.manifest import RUN_CONFIG, Records, read_manifest
from trainer.checkpoint.restore import restore
from trainer.checkpoint.resume import (
    DATA_ORDER,
    check_place,
    check_resumable,
    describe_layout,
    set_aside,
    set_aside_newer,
)
from trainer.checkpoint.retention import prepare_folder
from trainer.config import Config
from trainer.config_file import dump_config
from trainer.data.loader import MaskedBlocks, TrainingBatches
from trainer.deepspeed_config import ALLOWED_KEYS, stage_of
from trainer.distributed import World
from trainer.engine import TrainingEngine
from trainer.errors import EXIT_FINISHED, EXIT_STOPPED_AFTER_SAVING, UserError
from trainer.evaluate import Evaluator
from trainer.files import replace_synced
from trainer.inputs import Inputs, open_inputs, run_folder, sha256_of
from trainer.logs import make_log, rank_log
from trainer.loop import Loop
from trainer.metrics import ThroughputMeter
from trainer.model.build import BuiltModel, build_model
from trainer.model.device_peak import device_peak
from trainer.model.flops import flops_per_token
from trainer.objectives.mlm import Batch
from trainer.run_lock import RunLock, held
from trainer.signals import StopRequest, stop_requests
from trainer.state import TrainState
from trainer.tracking.console import TrainingConsole
from trainer.tracking.jsonl import read_lines
from trainer.tracking.reporter import Reporter

logger = logging.getLogger(__name__)
COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


PrepareText = Callable[[Config, World, StopRequest, Callable[[str], None]], Mapping[str, Path] | None]
"""(config, world, stop, say) → the folders of prepared data by path in the config; None when asked to stop."""


def no_raw_text(
    _config: Config, _world: World, _stop: StopRequest, _say: Callable[[str], None]
) -> Mapping[str, Path] | None:
    """A PrepareText for data that are all prepared."""
    return {}


def run(config: Config, resume: str = "auto", dry_run: bool = False, prepare_text: PrepareText = no_raw_text) -> int:
    """Train as the rank that RANK and WORLD_SIZE name; returns the exit code.

    Args:
        resume: auto, must, never, or the path of a checkpoint.
        dry_run: do one real step and one evaluation, and save nothing.
        prepare_text: called on all ranks together, to prepare raw text given in the place of data.
    """
    with stop_requests() as stop:
        world = distributed.start()
        try:
            with _lock(config, world, dry_run) as lock, _output(config, world, dry_run) as stream:
                console = TrainingConsole(stream) if world.is_main else None
                say = console.say if console is not None else _nothing
                if not dry_run:
                    _make_ready(run_folder(config), world, lock, say)
                folders = prepare_text(config, world, stop, say)
                if folders is None:
                    say(f"stopped on {stop.signal_name or 'a signal to another rank'}; the same command goes on")
                    return EXIT_STOPPED_AFTER_SAVING
                inputs = distributed.build_together(
                    world, lambda: open_inputs(config, world.size, check_sizes=world.is_main, folders=folders)
                )
                return _train(inputs, world, resume, dry_run, stop, console, lock)
        finally:
            distributed.stop()


def _lock(config: Config, world: World, dry_run: bool) -> AbstractContextManager[RunLock]:
    """Hold the run folder before anything is written there, logs included; a dry run writes nothing."""
    say = partial(print, flush=True)  # there is no other console yet
    return nullcontext(RunLock(run_folder(config), say)) if dry_run else held(world, run_folder(config), say)


@contextmanager
def _output(config: Config, world: World, dry_run: bool) -> Iterator[TextIO]:
    """Rank logs in the run folder; a dry run leaves none, so its logs lie in a temporary one."""
    with tempfile.TemporaryDirectory(prefix="maskwright-dry-run-") as scratch:
        path, error = Path(), None
        try:
            path = make_log(Path(scratch) if dry_run else run_folder(config), world.rank)
        except UserError as caught:
            error = caught
        distributed.raise_together(world, error)
        with rank_log(path, world.rank) as stream:
            yield stream


def _make_ready(run_dir: Path, world: World, lock: RunLock, say: Callable[[str], None]) -> None:
    """See that checkpoints can be written, and remove what unfinished saves left."""
    notes, error = lock.notes, None
    if world.is_main:
        try:
            notes = [*notes, *prepare_folder(run_dir)]
        except UserError as caught:
            error = caught
    distributed.raise_together(world, error)
    for line in notes:
        say(line)


def _nothing(_line: str) -> None:
    """The other ranks say nothing."""


def _train(
    inputs: Inputs,
    world: World,
    resume: str,
    dry_run: bool,
    stop: StopRequest,
    console: TrainingConsole | None,
    lock: RunLock,
) -> int:
    config, run_dir = inputs.config, run_folder(inputs.config)
    say = console.say if console is not None else _nothing

    checkpoint = None if dry_run else choose(world, run_dir, resume, say)
    manifest = read_manifest(checkpoint) if checkpoint else None
    state = TrainState(**manifest.state) if manifest else TrainState()
    say(_decision(config, resume, checkpoint, state, dry_run))
    if state.step >= inputs.plan.total_steps:
        say(f"finished: step {state.step} of {inputs.plan.total_steps} is done; nothing changed")
        return EXIT_FINISHED

    built = distributed.build_together(
        world, lambda: build_model(config.model, inputs.vocabulary, config.data.seq_len, config.run.seed)
    )
    # Before the engine, which at ZeRO stage 3 leaves no weight in the module to describe.
    records = Records(_layout(inputs, world), _identity(inputs, built), inputs.data_order(), _model_summary(built))
    if checkpoint and manifest:
        check_place(run_dir, checkpoint)
        check_resumable(checkpoint, manifest, records, inputs.data_order(with_shards=True))
        if change := describe_layout(manifest.layout, records.layout):
            say(f"resuming in another layout: {change}, step {state.step:,}")
    for line in (*inputs.describe(), *built.notes):
        say(line)
    if console is not None and not dry_run:
        _settle_run_folder(run_dir, inputs, console, resume, checkpoint, state)

    meter = _meter(inputs, built, world)  # before the engine, as the records are
    engine = _engine(inputs, built, world, say)
    if checkpoint:
        restore(engine, checkpoint, world)
    loop = Loop(
        config=config,
        plan=inputs.plan,
        world=world,
        engine=engine,
        objective=inputs.objective,
        order=inputs.order,
        open_batches=lambda state: _batches(inputs, world, state),
        evaluator=_evaluator(inputs),
        saver=_saver(run_dir, inputs, records, engine, world, checkpoint, lock),
        meter=meter,
        state=state,
        stop=stop,
        reporter=None,
        evaluated=distributed.from_main(world, _is_evaluated(run_dir, state)) if checkpoint else False,
    )
    if dry_run:
        return loop.dry_run(console)
    return _run_with_reports(loop, console, resumed_step=state.step if checkpoint else None)


def _run_with_reports(loop: Loop, console: TrainingConsole | None, resumed_step: int | None) -> int:
    if console is not None:
        total_steps = loop.plan.total_steps
        loop.reporter = Reporter(loop.saver.run_dir, console, total_steps, resumed_step, loop.config)
    try:
        return loop.run()
    finally:
        if loop.reporter is not None:
            loop.reporter.close()


def _engine(inputs: Inputs, built: BuiltModel, world: World, say: Callable[[str], None]) -> TrainingEngine:
    engine = TrainingEngine(built, inputs.ds_config, inputs.config.optimizer, world)
    if engine.document_attention is not None:
        say(engine.document_attention.note)
    if inputs.config.model.compile:
        engine.compile()
    return engine


def _evaluator(inputs: Inputs) -> Evaluator | None:
    config = inputs.config
    if inputs.validation is None:
        return None
    return Evaluator(inputs.validation, inputs.objective, config.eval.samples, config.model.document_attention)


def _is_evaluated(run_dir: Path, state: TrainState) -> bool:
    return any(line["step"] == state.step and "eval/loss" in line for line in read_lines(run_dir / "metrics.jsonl"))


def _batches(inputs: Inputs, world: World, state: TrainState) -> Iterable[Batch]:
    return TrainingBatches(
        inputs.order,
        inputs.plan,
        MaskedBlocks(inputs.sources, inputs.objective, inputs.config.run.seed, inputs.config.model.document_attention),
        rank=world.rank,
        first_sample=state.samples,
        steps=inputs.plan.total_steps - state.step,
        workers=inputs.config.data.workers,
        pin_memory=world.device.type == "cuda",
    )


def _saver(
    run_dir: Path,
    inputs: Inputs,
    records: Records,
    engine: TrainingEngine,
    world: World,
    checkpoint: Path | None,
    lock: RunLock,
) -> Saver:
    block = distributed.build_together(world, lambda: read_probe_block(inputs))
    saver = Saver(
        run_dir=run_dir,
        world=world,
        engine=engine,
        settings=inputs.config.checkpoint,
        records=records,
        contents=lambda: take_contents(engine, inputs, block),
        lock_lost=lock.lost,
    )
    if checkpoint and checkpoint.resolve().parent == checkpoints_folder(run_dir).resolve():
        saver.resumed(checkpoint, read_manifest(checkpoint).step)
    return saver


def _decision(config: Config, resume: str, checkpoint: Path | None, state: TrainState, dry_run: bool) -> str:
    """The first line: run folder, what was decided, and why."""
    name = f"{config.run.name} in {run_folder(config)}"
    if dry_run:
        return f"dry run of {name}: one step, nothing is saved"
    if checkpoint is not None:
        return f"run {name}: resuming from {checkpoint.name} at step {state.step} (--resume {resume})"
    why = "--resume never" if resume == "never" else f"--resume {resume}, no checkpoint found"
    return f"run {name}: starting afresh ({why})"


def _settle_run_folder(
    run_dir: Path, inputs: Inputs, console: TrainingConsole, resume: str, checkpoint: Path | None, state: TrainState
) -> None:
    """Before anything is written: move what this start leaves behind, and freeze the resolved inputs."""
    moved = None
    if resume == "never":
        moved = set_aside(run_dir)
    elif resume not in ("auto", "must"):
        moved = set_aside_newer(run_dir, state.step)
    if moved is not None:
        console.say(f"moved what this start does not continue to {moved}")
    _freeze(run_dir, inputs, console, checkpoint)


def _layout(inputs: Inputs, world: World) -> dict[str, Any]:
    """What the shape of DeepSpeed's files depends on."""
    return {
        "world_size": world.size,
        "stage": stage_of(inputs.ds_config),
        "precision": inputs.config.train.precision,
        "gradient_accumulation_dtype": inputs.config.train.gradient_accumulation_dtype,
    }


def _identity(inputs: Inputs, built: BuiltModel) -> dict[str, Any]:
    """What would change the result in silence if it changed over a resume."""
    shapes = [(name, list(tensor.shape)) for name, tensor in built.model.state_dict().items()]
    # Everything the forward pass depends on; the library's version and the dropouts (a training choice) do not count.
    fields = {
        name: value
        for name, value in built.model.config.to_dict().items()
        if "dropout" not in name and name not in ("transformers_version", "_name_or_path", "architectures", "dtype")
    }
    # Named only where it is on: a checkpoint from before there was such a key is one of a run without it.
    attention = {"document attention": "on"} if inputs.config.model.document_attention else {}
    return {
        **attention,
        "tokenizer": inputs.vocabulary.sha256[:16],
        "model": f"{type(built.model).__name__} {sha256_of([shapes, json.dumps(fields, default=str)])[:16]}",
        "objective": inputs.config.objective.model_dump(),
        "seed": inputs.config.run.seed,
        "seq_len": inputs.config.data.seq_len,
    }


def _model_summary(built: BuiltModel) -> dict[str, Any]:
    return {
        "class": type(built.model).__name__,
        "type": built.model.config.model_type,
        "parameters": sum(parameter.numel() for parameter in built.model.parameters()),
    }


def _meter(inputs: Inputs, built: BuiltModel, world: World) -> ThroughputMeter:
    flops = flops_per_token(built.model, inputs.attended_tokens, inputs.prediction_ratio)
    peak, label = device_peak(world.device, COMPUTE_DTYPES[inputs.config.train.precision])
    logger.info("model: %.4g training FLOPs a token; MFU is against %.4g FLOP/s a rank (%s)", flops, peak, label)
    return ThroughputMeter(flops, peak * world.size)


def _freeze(run_dir: Path, inputs: Inputs, console: TrainingConsole, checkpoint: Path | None) -> None:
    """Write the resolved inputs at the first start; on a resume say what has changed since the checkpoint was saved."""
    config_path, preset_path = run_dir / "config.yaml", run_dir / "deepspeed.json"
    if checkpoint is not None:
        saved = yaml.safe_load((checkpoint / RUN_CONFIG).read_text(encoding="utf-8"))
        changes = _changes(saved, inputs.config.model_dump(mode="json"))
        if saved["deepspeed"] == inputs.config.deepspeed and preset_path.is_file():  # one name: its content may differ
            frozen = json.loads(preset_path.read_text(encoding="utf-8"))
            before, now = ({key: given.get(key) for key in ALLOWED_KEYS} for given in (frozen, inputs.ds_config))
            changes += _changes(before, now)
        if changes:
            console.say(f"changed since {checkpoint.name} was saved: {', '.join(changes)}")
    if checkpoint is None or not config_path.is_file():
        replace_synced(config_path, dump_config(inputs.config).encode())
        replace_synced(preset_path, (json.dumps(inputs.ds_config, indent=2) + "\n").encode())
    _freeze_order(run_dir, inputs)


def _freeze_order(run_dir: Path, inputs: Inputs) -> None:
    """Record the data order; on a resume it may have grown by what lies ahead."""
    order = inputs.data_order(with_shards=True)
    content = json.dumps({**order, "sha256": sha256_of(order)}, indent=1) + "\n"
    path = run_dir / DATA_ORDER
    if not path.is_file() or path.read_text(encoding="utf-8") != content:
        replace_synced(path, content.encode())


def _changes(before: Any, after: Any, prefix: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        names = sorted({*before, *after})
        return [line for name in names for line in _changes(before.get(name), after.get(name), f"{prefix}{name}.")]
    return [] if before == after else [f"{prefix[:-1]} {before} → {after}"]
