"""One rank of a run, wired in reading order: config → inputs → resume → model → engine → checkpoint → loop."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TextIO

from trainer.checkpoint.begun import as_begun
from trainer.checkpoint.contents import prove_repeatable, read_probe_block, take_contents
from trainer.checkpoint.find import checkpoints_folder, choose
from trainer.checkpoint.identity import describe_run
from trainer.checkpoint.manifest import Records, read_manifest
from trainer.checkpoint.restore import restore
from trainer.checkpoint.resume import check_place, check_resumable, describe_layout
from trainer.checkpoint.retention import prepare_folder
from trainer.checkpoint.run_folder import check_replaceable, settle
from trainer.checkpoint.save import Saver
from trainer.config import CUDA_GRAPHS, Config, run_folder
from trainer.data.batch import Batch
from trainer.data.loader import SampledBlocks, TrainingBatches
from trainer.engine.engine import TrainingEngine
from trainer.engine.loss_kernel import settle_loss_kernel
from trainer.engine.precision import precision_notes
from trainer.errors import EXIT_FINISHED, EXIT_STOPPED_AFTER_SAVING, HangError, MaskwrightError, UserError
from trainer.evaluate import Evaluator
from trainer.inputs.consistency import compare, facts_of_inputs, facts_of_start
from trainer.inputs.inputs import Inputs, open_inputs
from trainer.liveness.activity import Activity
from trainer.liveness.stragglers import StragglerWatch
from trainer.liveness.watch import watched
from trainer.liveness.watchdog import Limits, end_at_once
from trainer.loop import Loop
from trainer.model.attention_backend import preferring, settle_attention_backend
from trainer.model.build import COMPUTE_DTYPES, BuiltModel, build_model
from trainer.objectives.objective import Criterion
from trainer.objectives.registry import make_criterion
from trainer.runtime import distributed
from trainer.runtime.determinism import make_deterministic
from trainer.runtime.distributed import World
from trainer.runtime.logs import make_log, rank_log
from trainer.runtime.paths import real_path
from trainer.runtime.process import job_id, node_name
from trainer.runtime.run_lock import RunLock, held
from trainer.runtime.signals import StopRequest, stop_requests, time_to_stop
from trainer.sizing.flops import flops_per_token
from trainer.sizing.micro_batch import settle_micro_size
from trainer.sizing.micro_batch_trial import largest_by_trial
from trainer.sizing.peak_flops import device_peak
from trainer.state import TrainState
from trainer.tracking.console import TrainingConsole
from trainer.tracking.jsonl import read_lines
from trainer.tracking.metrics import ThroughputMeter
from trainer.tracking.profiler import StepProfiler
from trainer.tracking.reporter import Reporter
from trainer.tracking.starts import record_start
from trainer.tracking.status import StatusWriter, change_status

logger = logging.getLogger(__name__)


PrepareText = Callable[[Config, World, StopRequest, Callable[[str], None]], Mapping[str, Path] | None]
"""(config, world, stop, say) → the folders of prepared data by path in the config; None when asked to stop."""


def no_raw_text(
    _config: Config, _world: World, _stop: StopRequest, _say: Callable[[str], None]
) -> Mapping[str, Path] | None:
    """A PrepareText for data that are all prepared."""
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
    with stop_requests() as stop:
        try:
            compare(world, lambda: facts_of_start(config, resume, dry_run))
            with (
                _lock(config, world, dry_run) as lock,
                _output(config, world, dry_run) as stream,
                _status(config, world, dry_run) as status,
                _watched(config, world, dry_run, status, give_up) as activity,
            ):
                console = TrainingConsole(stream) if world.is_main else None
                say = console.say if console is not None else _nothing
                if not dry_run:
                    _make_ready(run_folder(config), world, lock, say)
                    if world.is_main:  # whose clock decides
                        stop.due_at = time_to_stop(config.resilience.stop_before_end_seconds)
                for line in precision_notes(config.train.precision, world.device):
                    say(line)
                if config.train.deterministic:
                    say(make_deterministic(world.device))
                begun = distributed.from_main(world, as_begun(config, resume).defaults if world.is_main else 0)
                config = config.model_copy(update={"defaults": begun})
                with activity.within("prepare"):
                    folders = prepare_text(config, world, stop, say)
                if folders is None:
                    say(f"stopped on {stop.reason}; the same command goes on")
                    if status is not None:
                        status.ended(EXIT_STOPPED_AFTER_SAVING, stop.reason)
                    return EXIT_STOPPED_AFTER_SAVING
                micro_size = settle_micro_size(config, world, say, largest_by_trial, keep=not dry_run)
                inputs = distributed.build_together(
                    world, lambda: open_inputs(config, world.size, world.is_main, folders, micro_size)
                )
                compare(world, lambda: facts_of_inputs(inputs))
                return _train(inputs, world, resume, dry_run, stop, activity, console, status, lock)
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


@contextmanager
def _status(config: Config, world: World, dry_run: bool) -> Iterator[StatusWriter | None]:
    """RUN/status.json, on rank 0; every rank calls it. A dry run has none."""
    nodes = list(dict.fromkeys(distributed.gather(world, node_name())))
    if dry_run or not world.is_main:
        yield None
        return
    status = StatusWriter(run_folder(config), nodes, world.size)
    with status.until_the_end():
        yield status


@contextmanager
def _watched(
    config: Config, world: World, dry_run: bool, status: StatusWriter | None, give_up: Callable[[HangError], None]
) -> Iterator[Activity]:
    """This rank's activity, with heartbeats and a watchdog; a dry run leaves no files, and is not watched."""
    activity = Activity(on_enter=status.entered if status is not None else None)
    if dry_run:
        yield activity
        return
    run_dir = run_folder(config)

    def end(error: HangError, is_first: bool) -> None:
        if is_first:  # rank 0 may be the one that is stuck
            change_status(run_dir, state="failed", reason=error.problem, eta_seconds=None)
        give_up(error)

    with watched(run_dir, world.rank, world.size, activity, config.watchdog, end):
        yield activity


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
    activity: Activity,
    console: TrainingConsole | None,
    status: StatusWriter | None,
    lock: RunLock,
) -> int:
    config, run_dir = inputs.config, run_folder(inputs.config)
    say = console.say if console is not None else _nothing

    checkpoint = None if dry_run else choose(world, run_dir, resume, say)
    if not dry_run:
        distributed.build_together(
            world, lambda: check_replaceable(run_dir, resume, checkpoint) if world.is_main else None
        )
    manifest = read_manifest(checkpoint) if checkpoint else None
    state = TrainState(**manifest.state) if manifest else TrainState()
    activity.at_step(state.step, is_started=False)
    say(_decision(config, resume, checkpoint, state, dry_run))
    if state.step >= inputs.plan.total_steps:
        say(f"finished: step {state.step} of {inputs.plan.total_steps} is done; nothing changed")
        if status is not None:
            status.take_back()
        return EXIT_FINISHED

    built = distributed.build_together(
        world, lambda: build_model(config.model, inputs.vocabulary, config.data.seq_len, config.run.seed)
    )
    records = describe_run(inputs, built, world)
    if checkpoint and manifest:
        check_place(run_dir, checkpoint)
        check_resumable(checkpoint, manifest, records, inputs.data_order(with_shards=True))
        if change := describe_layout(manifest.layout, records.layout):
            say(f"resuming in another layout: {change}, step {state.step:,}")
    if not dry_run:
        _count_start(config, world, state, say)
    if status is not None:
        status.start(state, inputs.plan.total_steps, checkpoint.name if checkpoint else "", is_new=resume == "never")
    for line in (*inputs.describe(), *built.notes):
        say(line)
    if console is not None and not dry_run:
        settle(run_dir, inputs, console.say, resume, checkpoint, state)

    meter = _meter(inputs, built, world)  # before the engine, as the records are
    micro_size = inputs.plan.micro_size
    backend = settle_attention_backend(config, built.model.config, micro_size, world, say, keep=not dry_run)
    kernel = settle_loss_kernel(config, inputs.vocabulary.size, world, say)
    criterion = make_criterion(config, kernel)
    with preferring(backend, world.device):
        engine = _engine(inputs, built, world, say)
        limits = Limits.of(config.watchdog)
        distributed.set_timeouts(limits.of_start, limits.of_start)  # of the groups that DeepSpeed has made, too
        if checkpoint:
            restore(engine, checkpoint, world)
        loop = Loop(
            config=config,
            plan=inputs.plan,
            world=world,
            engine=engine,
            criterion=criterion,
            order=inputs.order,
            open_batches=lambda state: _batches(inputs, world, state),
            evaluator=_evaluator(inputs, criterion),
            saver=_saver(run_dir, inputs, records, engine, world, checkpoint, lock),
            meter=meter,
            state=state,
            stop=stop,
            activity=activity,
            reporter=None,
            profiler=StepProfiler(None if dry_run else config.train.profile, run_dir, world, state.step + 1, say),
            evaluated=distributed.from_main(world, _is_evaluated(run_dir, state)) if checkpoint else False,
        )
        if dry_run:
            return loop.dry_run(console)
        return _run_with_reports(loop, console, status, resumed_step=state.step if checkpoint else None)


def _count_start(config: Config, world: World, state: TrainState, say: Callable[[str], None]) -> None:
    """Record this start, and end a job whose starts lead nowhere."""
    error = None
    try:
        if world.is_main:
            line = record_start(run_folder(config), state.step, world.size, config.resilience.max_idle_starts)
            (say if job_id() else logger.info)(line)  # who starts a run by hand knows it
    except MaskwrightError as caught:
        error = caught
    distributed.raise_together(world, error)


def _run_with_reports(
    loop: Loop, console: TrainingConsole | None, status: StatusWriter | None, resumed_step: int | None
) -> int:
    stragglers, of_run = _straggler_watch(loop), (loop.plan, resumed_step, loop.config)
    loop.reporter = distributed.build_together(
        loop.world,
        lambda: Reporter(loop.saver.run_dir, console, status, stragglers, *of_run) if console and status else None,
    )
    try:
        code = loop.run()
        if status is not None:
            status.ended(code, "" if code == EXIT_FINISHED else loop.stop.reason, loop.state)
        return code
    finally:
        if loop.reporter is not None:
            loop.reporter.close()


def _straggler_watch(loop: Loop) -> StragglerWatch | None:
    """Where it is wanted; every rank calls it."""
    settings, nodes = loop.config.watchdog, distributed.gather(loop.world, node_name())
    if settings.straggler_minutes is None:
        return None
    return StragglerWatch(settings.straggler_minutes * 60, settings.straggler_ratio, nodes, time.monotonic())


def _engine(inputs: Inputs, built: BuiltModel, world: World, say: Callable[[str], None]) -> TrainingEngine:
    engine = TrainingEngine(built, inputs.ds_config, inputs.config.optimizer, world)
    if engine.document_attention is not None:
        say(engine.document_attention.note)
    if inputs.config.model.compile:
        if inputs.config.model.compile == CUDA_GRAPHS and world.device.type == "cpu":
            say(f"compile: on a CPU there are no CUDA graphs; {CUDA_GRAPHS} is as true")
        engine.compile(inputs.config.model.compile, shapes=inputs.shape_count)
    return engine


def _evaluator(inputs: Inputs, criterion: Criterion) -> Evaluator | None:
    if inputs.validation is None:
        return None
    micro_size = inputs.plan.micro_size  # for the longest blocks, whichever phase the run is in
    return Evaluator(inputs.validation, inputs.objective, criterion, inputs.config.eval.samples, micro_size)


def _is_evaluated(run_dir: Path, state: TrainState) -> bool:
    return any(line["step"] == state.step and "eval/loss" in line for line in read_lines(run_dir / "metrics.jsonl"))


def _batches(inputs: Inputs, world: World, state: TrainState) -> Iterator[Batch]:
    """This rank's micro-batches from a state on; each phase of the run has blocks, and a loader, of its own."""
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
    distributed.build_together(world, lambda: prove_repeatable(engine, inputs, block))
    saver = Saver(
        run_dir=run_dir,
        world=world,
        engine=engine,
        settings=inputs.config.checkpoint,
        records=records,
        contents=lambda: take_contents(engine, inputs, block),
        lock_lost=lock.lost,
    )
    if checkpoint and real_path(checkpoint).parent == real_path(checkpoints_folder(run_dir)):
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


def _meter(inputs: Inputs, built: BuiltModel, world: World) -> ThroughputMeter:
    attended = zip(inputs.objectives, inputs.attended_tokens, strict=True)
    flops = [
        flops_per_token(built.model, tokens, objective.head_rows / objective.seq_len) for objective, tokens in attended
    ]
    peak, label = device_peak(world.device, COMPUTE_DTYPES[inputs.config.train.precision])
    counted = ", then ".join(f"{each:.4g}" for each in flops)
    logger.info("model: %s training FLOPs a token; MFU is against %.4g FLOP/s a rank (%s)", counted, peak, label)
    return ThroughputMeter(flops, peak * world.size)
