"""One rank of a run, wired in reading order: config → inputs → resume → model → engine → checkpoint → loop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from pathlib import Path

from torch import Tensor

from trainer.checkpoint.begun import as_begun
from trainer.checkpoint.contents import (
    kept_of_start,
    prove_causal,
    prove_head,
    prove_repeatable,
    read_probe_block,
    take_contents,
)
from trainer.checkpoint.identity import run_identity
from trainer.checkpoint.manifest import Records, read_checkpoint_manifest
from trainer.checkpoint.restore import read_updates, restore
from trainer.checkpoint.resume import check_place, check_resumable, describe_frozen_change, describe_layout, is_own
from trainer.checkpoint.retention import prepare_folder
from trainer.checkpoint.run_folder import settle
from trainer.checkpoint.save import Saver
from trainer.checkpoint.start_point import StartPoint, choose_start, nothing_left
from trainer.config import CUDA_GRAPHS, Config, run_folder
from trainer.data.batch import Batch
from trainer.data.loader import SampledBlocks, TrainingBatches
from trainer.engine.engine import TrainingEngine
from trainer.engine.loss_kernel import resolve_loss_kernel
from trainer.engine.precision import precision_notes
from trainer.errors import EXIT_FINISHED, EXIT_STOPPED_AFTER_SAVING, HangError, MaskwrightError, UserError
from trainer.evaluation.evaluator import Evaluator
from trainer.evaluation.probe import Probe
from trainer.inputs.consistency import compare, facts_of_inputs, facts_of_start
from trainer.inputs.inputs import Inputs, open_inputs
from trainer.inputs.probe import open_probe
from trainer.liveness.stragglers import StragglerWatch
from trainer.liveness.watchdog import Limits, end_at_once
from trainer.loop import Loop
from trainer.model.attention_backend import preferring, resolve_attention_backend
from trainer.model.build import COMPUTE_DTYPES, BuiltModel
from trainer.model.classes import CAUSAL, MAIN
from trainer.model.kept import describe_kept
from trainer.model.teacher import TeacherModel, load_teacher
from trainer.model.trained import build_trained
from trainer.objectives.objective import Criterion
from trainer.objectives.registry import family_of, make_criterion, make_samples
from trainer.run import Run, opened
from trainer.runtime import distributed
from trainer.runtime.determinism import make_deterministic
from trainer.runtime.distributed import World
from trainer.runtime.process import job_id, node_name
from trainer.runtime.signals import StopRequest, stop_requests
from trainer.sizing.flops import flops_per_token, head_flops, prediction_flops, step_flops
from trainer.sizing.micro_batch import resolve_micro_size
from trainer.sizing.micro_batch_trial import largest_by_trial
from trainer.sizing.peak_flops import device_peak
from trainer.state import TrainState
from trainer.tracking.jsonl import read_metrics
from trainer.tracking.metrics import ThroughputMeter
from trainer.tracking.profiler import StepProfiler
from trainer.tracking.reporter import Reporter
from trainer.tracking.starts import record_start
from trainer.tracking.status import settle_resume

logger = logging.getLogger(__name__)


PrepareText = Callable[[Config, World, StopRequest, Callable[[str], None]], Mapping[str, Path] | None]
"""(config, world, stop, say) → the folders of prepared data by path in the config; None when asked to stop."""


def no_raw_text(
    _config: Config, _world: World, _stop: StopRequest, _say: Callable[[str], None]
) -> Mapping[str, Path] | None:
    """Prepare nothing: a PrepareText for data that are all prepared."""
    return {}


def run(
    config: Config,
    resume: str = "auto",
    dry_run: bool = False,
    prepare_text: PrepareText = no_raw_text,
    give_up: Callable[[HangError], None] = end_at_once,
) -> int:
    """Train as the rank that RANK and WORLD_SIZE name; returns the exit code.

    Args:
        resume: auto, must, never, or the path of a checkpoint.
        dry_run: do one real step of each phase and one evaluation, and save nothing.
        prepare_text: called on all ranks together, to prepare raw text given in the place of data.
        give_up: called in a thread when the run is stuck; it reports the error, and ends the process.
    """
    world = distributed.start(Limits.of(config.watchdog).of_start, None if dry_run else run_folder(config) / "logs")
    resume = resume if dry_run else settle_resume(run_folder(config), resume)
    with stop_requests() as stop:
        try:
            compare(world, lambda: facts_of_start(config, resume, dry_run))
            with opened(config, world, resume, dry_run, stop, give_up) as this:
                return _open_and_train(this, prepare_text)
        finally:
            distributed.stop()


def _open_and_train(run: Run, prepare_text: PrepareText) -> int:
    """Prepare what is raw text, open the inputs on all ranks, and train on them."""
    config, world = run.config, run.world
    if not run.is_dry:
        _make_ready(run)
    for line in precision_notes(config.train.precision, world.device):
        run.say(line)
    if config.train.deterministic:
        run.say(make_deterministic(world.device))
    begun = distributed.broadcast_from_main(world, as_begun(config, run.resume).defaults if world.is_main else 0)
    config = config.model_copy(update={"defaults": begun})
    with run.activity.within("prepare"):
        folders = prepare_text(config, world, run.stop, run.say)
    if folders is None:
        run.say(f"stopped on {run.stop.reason}; the same command goes on")
        run.status.ended(EXIT_STOPPED_AFTER_SAVING, run.stop.reason)
        return EXIT_STOPPED_AFTER_SAVING
    micro_size = resolve_micro_size(config, world, run.say, largest_by_trial, keep=not run.is_dry)
    inputs = distributed.run_on_all_ranks(
        world, lambda: open_inputs(config, world.size, world.is_main, folders, micro_size)
    )
    compare(world, lambda: facts_of_inputs(inputs))
    return _train(run, inputs)


def _make_ready(run: Run) -> None:
    """See that checkpoints can be written, and remove what unfinished saves left."""
    notes, error = run.lock.notes, None
    if run.world.is_main:
        try:
            notes = [*notes, *prepare_folder(run.folder)]
        except UserError as caught:
            error = caught
    distributed.raise_on_all_ranks(run.world, error)
    for line in notes:
        run.say(line)


def _train(run: Run, inputs: Inputs) -> int:
    """Build the model, check that it may go on from the checkpoint, and hand all to the loop."""
    start = StartPoint.afresh() if run.is_dry else choose_start(run.world, run.folder, run.resume, run.say)
    run.activity.at_step(start.state.step, is_started=False)
    run.say(_decision(run, start))
    if done := nothing_left(inputs.config, start.state, inputs.plan.total_steps):
        run.say(f"{done}; nothing changed")
        run.status.take_back()
        return EXIT_FINISHED

    config, world = inputs.config, run.world
    built = distributed.run_on_all_ranks(
        world,
        lambda: build_trained(config, inputs.vocabulary, family_of(config)),
    )
    teacher = distributed.run_on_all_ranks(
        world, lambda: load_teacher(config, inputs.vocabulary, family_of(config), world.device)
    )
    records = run_identity(inputs, built, world, teacher)
    _check_start(run, inputs, start, records, built)
    _begin(run, inputs, built, start)

    meter = _meter(inputs, built, teacher, world)  # before the engine, as the records are
    micro_size = inputs.plan.micro_size
    backend = resolve_attention_backend(config, built.model.config, micro_size, world, run.say, keep=not run.is_dry)
    kernel = resolve_loss_kernel(config, inputs.vocabulary.size, world, run.say)
    criterion = make_criterion(config, kernel, teacher)
    with preferring(backend, world.device):
        engine = _engine(inputs, built, world, run.say, start.checkpoint)
        limits = Limits.of(config.watchdog)
        distributed.set_timeouts(limits.of_start, limits.of_start)  # of the groups that DeepSpeed has made, too
        if start.checkpoint:
            restore(engine, start.checkpoint, world)
        engine.set_rope_theta(inputs.order.phases.rope_theta_after(start.state.samples))
        loop = _loop(run, inputs, start, records, engine, criterion, meter)
        if run.is_dry:
            return loop.dry_run(run.console)
        return _run_with_reports(run, loop, start)


def _check_start(run: Run, inputs: Inputs, start: StartPoint, records: Records, built: BuiltModel) -> None:
    """Refuse a checkpoint of another run, and say what is spread anew, frozen or no longer so."""
    checkpoint = start.checkpoint
    if checkpoint is None or start.manifest is None:
        return
    check_place(run.folder, checkpoint)
    check_resumable(checkpoint, start.manifest, records, inputs.data_order(with_shards=True))
    if change := describe_layout(start.manifest.layout, records.layout):
        run.say(f"resuming in another layout: {change}, step {start.state.step:,}")
    sizes = {name: parameter.numel() for name, parameter in built.module.named_parameters()}
    line = distributed.run_on_all_ranks(run.world, lambda: describe_frozen_change(checkpoint, sizes, built.frozen))
    if line:
        run.say(f"frozen: {line}")


def _begin(run: Run, inputs: Inputs, built: BuiltModel, start: StartPoint) -> None:
    """Record the start, say what is trained, and freeze what it is trained on."""
    if not run.is_dry:
        _count_start(run, start.state)
    is_branch = start.checkpoint is not None and not is_own(run.folder, start.checkpoint)
    run.status.start(start.state, inputs.plan.total_steps, start.checkpoint, run.resume == "never", is_branch)
    for line in (*inputs.describe(), *built.notes):
        run.say(line)
    if run.world.is_main and not run.is_dry:
        settle(run.folder, inputs, run.say, run.resume, start.checkpoint, start.state)


def _loop(
    run: Run,
    inputs: Inputs,
    start: StartPoint,
    records: Records,
    engine: TrainingEngine,
    criterion: Criterion,
    meter: ThroughputMeter,
) -> Loop:
    config, world, state = inputs.config, run.world, start.state
    profiled = None if run.is_dry else config.train.profile
    return Loop(
        config=config,
        plan=inputs.plan,
        world=world,
        engine=engine,
        criterion=criterion,
        order=inputs.order,
        open_batches=lambda state: _batches(inputs, world, state),
        evaluator=_evaluator(inputs, criterion, world),
        saver=_saver(run, inputs, records, engine, start.checkpoint),
        meter=meter,
        state=state,
        stop=run.stop,
        activity=run.activity,
        reporter=None,
        profiler=StepProfiler(profiled, run.folder, world, state.step + 1, run.say),
        evaluated=distributed.broadcast_from_main(world, _is_evaluated(run.folder, state))
        if start.checkpoint
        else False,
    )


def _count_start(run: Run, state: TrainState) -> None:
    """Record this start, and end a job whose starts lead nowhere."""
    error = None
    try:
        if run.world.is_main:
            line = record_start(run.folder, state.step, run.world.size, run.config.resilience.max_idle_starts)
            (run.say if job_id() else logger.info)(line)  # who starts a run by hand knows it
    except MaskwrightError as caught:
        error = caught
    distributed.raise_on_all_ranks(run.world, error)


def _run_with_reports(run: Run, loop: Loop, start: StartPoint) -> int:
    watch = _straggler_watch(loop)
    stragglers = watch.add if watch is not None else None
    of_run = (loop.plan, start.state.step if start.checkpoint else None, loop.config)
    loop.reporter = distributed.run_on_all_ranks(
        run.world,
        lambda: Reporter(run.folder, run.console, run.status, stragglers, *of_run) if run.world.is_main else None,
    )
    try:
        code = loop.run()
        run.status.ended(code, loop.early_end if code == EXIT_FINISHED else run.stop.reason, loop.state)
        return code
    finally:
        if loop.reporter is not None:
            loop.reporter.close()


def _straggler_watch(loop: Loop) -> StragglerWatch | None:
    """Make a watch for stragglers where it is wanted; every rank calls it."""
    settings, nodes = loop.config.watchdog, distributed.all_gather(loop.world, node_name())
    if settings.straggler_minutes is None:
        return None
    return StragglerWatch(settings.straggler_minutes * 60, settings.straggler_ratio, nodes, time.monotonic())


def _engine(
    inputs: Inputs, built: BuiltModel, world: World, say: Callable[[str], None], checkpoint: Path | None
) -> TrainingEngine:
    updates = read_updates(checkpoint, world) if checkpoint else {}
    engine = TrainingEngine(built, inputs.ds_config, inputs.config.optimizer, world, updates)
    if engine.document_attention is not None:
        say(engine.document_attention.note)
    if inputs.config.model.compile:
        if inputs.config.model.compile == CUDA_GRAPHS and world.device.type == "cpu":
            say(f"compile: on a CPU there are no CUDA graphs; {CUDA_GRAPHS} is as true")
        engine.compile(inputs.config.model.compile, shapes=inputs.shape_count)
    return engine


def _evaluator(inputs: Inputs, criterion: Criterion, world: World) -> Evaluator | None:
    if inputs.validation is None:
        return None
    config, micro_size = inputs.config, inputs.plan.micro_size  # for the longest blocks, whichever phase the run is in
    objective = make_samples(config, inputs.vocabulary, config.data.seq_len, evaluating=True)
    probe = None
    if (probed := distributed.run_on_all_ranks(world, lambda: open_probe(config, inputs.tokenizer))) is not None:
        labelled, tokens = probed
        probe = Probe(labelled, tokens, inputs.vocabulary.filler_id, config.data.seq_len, micro_size)
    return Evaluator(inputs.validation, objective, criterion, config.eval.samples, micro_size, probe, inputs.tokenizer)


def _is_evaluated(run_dir: Path, state: TrainState) -> bool:
    return any(line["step"] == state.step and "eval/loss" in line for line in read_metrics(run_dir / "metrics.jsonl"))


def _batches(inputs: Inputs, world: World, state: TrainState) -> Iterator[Batch]:
    """Yield this rank's micro-batches from a state on; each phase of the run has blocks, and a loader, of its own."""
    config, runs = inputs.config, inputs.plan.runs(state.samples, inputs.plan.total_steps - state.step)
    for phase, runs_of_phase in groupby(runs, key=lambda run: run.shape.phase):
        first, *others = runs_of_phase
        yield from TrainingBatches(
            inputs.order,
            inputs.plan,
            SampledBlocks(inputs.sources, inputs.objectives[phase], config.run.seed),
            rank=world.rank,
            first_sample=first.first_sample,
            steps=first.steps + sum(run.steps for run in others),
            workers=config.data.workers,
            pin_memory=world.device.type == "cuda",
        )


def _saver(run: Run, inputs: Inputs, records: Records, engine: TrainingEngine, checkpoint: Path | None) -> Saver:
    world = run.world
    block = distributed.run_on_all_ranks(world, lambda: read_probe_block(inputs))
    distributed.run_on_all_ranks(world, lambda: prove_repeatable(engine, inputs, block))
    distributed.run_on_all_ranks(world, lambda: prove_head(engine, inputs, block))
    if family_of(inputs.config) == CAUSAL:
        distributed.run_on_all_ranks(world, lambda: prove_causal(engine, inputs, block))
    kept: dict[str, Tensor] = distributed.run_on_all_ranks(
        world, lambda: kept_of_start(checkpoint, engine.exports[MAIN], inputs.config.model) if world.is_main else {}
    )
    for line in describe_kept(kept):
        run.say(line)
    saver = Saver(
        run_dir=run.folder,
        world=world,
        engine=engine,
        settings=inputs.config.checkpoint,
        records=records,
        contents=lambda: take_contents(engine, inputs, block, kept),
        lock_lost=run.lock.lost,
    )
    if checkpoint and is_own(run.folder, checkpoint):
        saver.resumed(checkpoint, read_checkpoint_manifest(checkpoint).step)
    return saver


def _decision(run: Run, start: StartPoint) -> str:
    """Say in the first line: run folder, what was decided, and why."""
    name = f"{run.config.run.name} in {run.folder}"
    if run.is_dry:
        return f"dry run of {name}: one step, nothing is saved"
    if start.checkpoint is not None:
        return f"run {name}: resuming from {start.checkpoint.name} at step {start.state.step} (--resume {run.resume})"
    why = "--resume never" if run.resume == "never" else f"--resume {run.resume}, no checkpoint found"
    return f"run {name}: starting afresh ({why})"


def _meter(inputs: Inputs, built: BuiltModel, teacher: TeacherModel | None, world: World) -> ThroughputMeter:
    flops = [
        step_flops(built.exports, attended, phase.seq_len)
        for attended, phase in zip(inputs.attended_tokens, inputs.order.phases, strict=True)
    ]
    of_head = prediction_flops(built.exports)
    if teacher is not None:
        flops = [
            each + flops_per_token(teacher.model, attended, prediction_ratio=0.0)
            for each, attended in zip(flops, inputs.attended_tokens, strict=True)
        ]
        of_head += head_flops(teacher.model)
    peak, label = device_peak(world.device, COMPUTE_DTYPES[inputs.config.train.precision])
    counted = ", then ".join(f"{each:.4g}" for each in flops)
    logger.info(
        "model: %s training FLOPs a token and %.4g a prediction; MFU is against %.4g FLOP/s a rank (%s)",
        counted,
        of_head,
        peak,
        label,
    )
    return ThroughputMeter(flops, of_head, peak * world.size)
