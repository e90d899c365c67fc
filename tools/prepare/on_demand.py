"""Raw text given straight to `train`: prepared on first use, by all ranks together, into a cache.

The cache is keyed by what decides the result: the content of the files, the tokenizer and the settings. So a second
run on the same text, or the same run started again, finds it; a killed one goes on with the units that are missing.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import xxhash

from tools.prepare.encode import Encoder
from tools.prepare.estimate import Estimate, estimate_output
from tools.prepare.held_out import choose_fraction
from tools.prepare.hints import input_notes
from tools.prepare.inputs import find_inputs
from tools.prepare.job import TOKENIZER_FOLDER, Job, open_job
from tools.prepare.option_names import CONFIG
from tools.prepare.options import PrepareOptions
from tools.prepare.pieces import InputFile
from tools.prepare.readers import read_documents
from tools.prepare.run import finalize_job, prepare_task
from tools.prepare.special_tokens import TEXT, SpecialTokens
from tools.prepare.summary import describe_tokens, human_bytes
from tools.prepare.text_cache import CACHE_FOLDER, describe_unused
from tools.prepare.work_folder import recorded_units
from trainer.checkpoint.manifest import DATA_ORDER
from trainer.config import Config, run_folder
from trainer.data.manifest import MANIFEST, PREPARE_WORK_FOLDER, SPLITS, read_data_manifest, split_folder
from trainer.errors import MaskwrightError, UserError
from trainer.inputs.consistency import compare
from trainer.inputs.inputs import check_without_data
from trainer.model.source import tokenizer_source
from trainer.runtime import distributed
from trainer.runtime.distributed import World
from trainer.runtime.files import file_hash, replace_synced
from trainer.runtime.paths import user_path
from trainer.runtime.signals import StopRequest

_SUMS = "sums.json"
_POLL_SECONDS = 1.0
_TELL_SECONDS = 10.0
Say = Callable[[str], None]
Sums = dict[str, list[Any]]
"""path → [bytes, mtime in ns, xxh3_128]: what a file is known by, so that its content is read once."""


@dataclass
class RawText:
    """What is known of the raw text in a config, before anything is prepared.

    Attributes:
        folders: of raw paths that have been prepared.
        estimates: about how many tokens the others will give for training.
        held_out: about how many there will be of validation data that are not prepared; None for others.
        notes: a line for each of the others.
    """

    folders: dict[str, Path] = field(default_factory=dict)
    estimates: dict[str, int] = field(default_factory=dict)
    held_out: int | None = None
    notes: list[str] = field(default_factory=list)


def prepare_raw_text(
    config: Config, world: World, stop: StopRequest, say: Say, of_run: bool = True
) -> Mapping[str, Path] | None:
    """Prepare the raw text of a config; every rank calls it, and does its share.

    Args:
        of_run: a run starts with it: check before anything is prepared, which may take hours, what else the run needs,
            and say what else lies in the cache.

    Returns:
        The folder behind each path that is raw text; None when a rank was asked to stop (what is done is kept).

    Raises:
        MaskwrightError: on every rank, for a mistake in the text or the settings.
    """
    is_checked = not of_run
    paths = distributed.run_on_all_ranks(world, lambda: raw_paths(config))
    compare(world, lambda: {"paths of raw text": paths})
    folders: dict[str, Path] = {}
    for path in paths:
        job = _shared_job(config, path, world)
        if not _is_prepared(job.output):
            if not is_checked:
                distributed.run_on_all_ranks(world, lambda: check_without_data(config) if world.is_main else None)
                is_checked = True
            for note in _notes(config, path, job):
                say(note)
            say(
                f"preparing {path} ({_size(job)}) on {world.size} rank{'s' if world.size > 1 else ''} into {job.output}"
            )
            if not _prepare_together(job, world, stop, say):
                return None
            say(f"prepared {path}")
        folders[path] = job.output
    if of_run and folders and world.is_main and (note := describe_unused(_cache(config), folders.values())):
        say(note)
    return folders


def look_up(config: Config) -> RawText:
    """Find which raw text of a config is prepared already, and estimate how much the rest will be; write nothing."""
    found = RawText()
    for path in raw_paths(config):
        job = _open(config, path, Path(os.devnull))
        sums = _known_sums(_cache(config), job.inputs.files)
        if len(sums) == len(job.inputs.files):
            folder = _begun_with(config, job, path, sums) or _cache(config) / _name_of(job, path, sums)
            if _is_prepared(folder):
                found.folders[path] = folder
                continue
        estimate = _estimate(job)
        found.estimates[path] = round(estimate.tokens * (1 - job.validation_fraction))
        if path == config.data.validation_path and config.eval.every_steps is not None:
            found.held_out = round(estimate.tokens * (job.validation_fraction or 1))
        found.notes.append(
            f"{path} is raw text ({_size(job)}, about {estimate.tokens:,.0f} tokens): the first start prepares it into "
            f"{_cache(config)}; until then the numbers are estimates"
        )
        found.notes += _notes(config, path, job)
    if (found.folders or found.estimates) and (note := describe_unused(_cache(config), found.folders.values())):
        found.notes.append(note)
    return found


def raw_documents(config: Config, path: str) -> Iterator[str]:
    """Read the documents behind a path that is raw text, as they are prepared; empty ones are left out.

    Raises:
        UserError: for a mistake in the text or the settings.
    """
    job = _open(config, path, Path(os.devnull))
    with tempfile.TemporaryDirectory() as scratch:
        reading = replace(job.work_settings().reading, scratch=scratch)
        for piece in (piece for unit in job.units for piece in unit.pieces):
            yield from (text for text, _ in read_documents(piece, reading) if text)


def raw_paths(config: Config) -> list[str]:
    """List the paths of data.train and data.validation that are raw text, each once."""
    paths = [source.path for source in config.data.train]
    if config.data.validation_path is not None and config.eval.every_steps is not None:
        paths.append(config.data.validation_path)
    return [path for path in dict.fromkeys(paths) if _is_raw(path, config)]


def _is_raw(path: str, config: Config) -> bool:
    """Tell whether a path is text and no data set; what is neither is left to the error of opening it as a data set."""
    if config.data.text.format == "hub":
        return not user_path(path, "data").exists()
    folder = user_path(path, "data")
    if folder.is_dir():
        unfinished = (folder / PREPARE_WORK_FOLDER).exists() or (folder / TOKENIZER_FOLDER / "tokenizer.json").exists()
        if unfinished or any((folder / name / MANIFEST).exists() for name in ("", *SPLITS)):
            return False
    elif not folder.exists() and not any(character in path for character in "*?["):
        return False
    try:
        find_inputs([path], config.data.text.format, CONFIG, _own_folders(config))
    except UserError:
        return folder.is_file()  # one file, named on purpose: say what is wrong with it
    return True


def _open(config: Config, path: str, output: Path) -> Job:
    text = config.data.text
    options = PrepareOptions(
        format=text.format,
        field=text.field,
        documents=text.documents,
        validation_fraction=text.validation_fraction or 0.0,
        on_bad_document=text.on_bad_document,
        delimiter=text.delimiter,
        special_in_text=text.special_in_text,
        word_starts=text.word_starts or (None if config.objective.scheme == "token" else "tokenizer"),
        sentence_starts=text.sentence_starts or (None if config.objective.pair is None else "rules"),
    )
    job = open_job([path], tokenizer_source(config), str(output), options, CONFIG, _own_folders(config))
    return replace(job, validation_fraction=choose_fraction(job)) if _chooses_fraction(config, path) else job


def _chooses_fraction(config: Config, path: str) -> bool:
    """Tell whether the size of the text says how much of it is held out; also while evaluation is turned off, because
    that must not change what is trained on."""
    data = config.data
    return data.holds_out and path == data.validation_path and data.text.validation_fraction is None


def _notes(config: Config, path: str, job: Job) -> list[str]:
    notes = input_notes(job.inputs, job.documents, job.names)
    if _chooses_fraction(config, path):
        share = f"about {job.validation_fraction:.1%} of its documents, chosen by their hash"
        notes.append(f"held out of {path} for evaluation: {share} (data.validation=auto)")
    return notes


def _own_folders(config: Config) -> list[Path]:
    """List what a run writes itself: that is no text, where it lies within a folder of text."""
    return [_cache(config), run_folder(config)]


def _shared_job(config: Config, path: str, world: World) -> Job:
    """Make the job that prepares a path, on every rank; its output is the place in the cache."""
    job = distributed.run_on_all_ranks(world, lambda: _open(config, path, Path(os.devnull)))
    compare(world, lambda: _facts(job, path))
    cache = _cache(config)
    known = distributed.broadcast_from_main(world, _known_sums(cache, job.inputs.files) if world.is_main else None)
    unknown = [file for file in job.inputs.files if file.path not in known]
    own = distributed.run_on_all_ranks(
        world, lambda: {file.path: _sum_of(file) for file in unknown[world.rank :: world.size]}
    )
    for part in distributed.all_gather(world, own):
        known |= part
    if unknown and world.is_main:
        cache.mkdir(parents=True, exist_ok=True)
        replace_synced(cache / _SUMS, json.dumps({**_read_sums(cache), **known}).encode())
    begun = distributed.broadcast_from_main(world, _begun_with(config, job, path, known) if world.is_main else None)
    return replace(job, output=begun or cache / _name_of(job, path, known))


def _begun_with(config: Config, job: Job, path: str, sums: Sums) -> Path | None:
    """Find the prepared folder that the run has begun with, where the default was another: all special tokens as text.

    Of the validation text a run records nothing: it keeps what is there.
    """
    if config.data.text.special_in_text is not None:
        return None
    as_text = replace(job, special=SpecialTokens.of(job.tokenizer, job.vocabulary, TEXT))
    folder, today = (_cache(config) / _name_of(one, path, sums) for one in (as_text, job))
    try:
        order = json.loads((run_folder(config) / DATA_ORDER).read_text(encoding="utf-8"))
        begun = [source["fingerprint"] for source in order["sources"]]
        same = read_data_manifest(split_folder(folder, "train")).fingerprint in begun
    except (OSError, ValueError, KeyError, TypeError, MaskwrightError):
        return None  # no such run, or none that can be read: it has nothing to keep
    trained_on = path in [source.path for source in config.data.train]
    return folder if same or not (trained_on or _is_prepared(today)) else None


def _facts(job: Job, path: str) -> dict[str, Any]:
    """Collect what a rank has found behind a path; contents are read in shares, so that one rank hashes each."""
    files = {file.path: f"{file.size:,} bytes {file.revision}".strip() for file in job.inputs.files}
    return {f"text of {path}": files, "tokenizer": job.vocabulary.sha256, "settings of the text": job.settings}


def _prepare_together(job: Job, world: World, stop: StopRequest, say: Say) -> bool:
    """Write each rank's share of the units, then join them on rank 0; return False when a rank was asked to stop.

    The ranks agree every second, so that one that has failed or been asked to stop does not leave the others waiting,
    and none waits longer in a reduction than that, however long the work takes.
    """
    cancel, errors = threading.Event(), []
    workers = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))

    def work() -> None:
        try:
            prepare_task(job, world.rank, world.size, workers, cancel=cancel)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, name="prepare", daemon=True)
    thread.start()
    told = time.monotonic()
    while True:
        thread.join(_POLL_SECONDS)
        finished, failed, stopped = distributed.all_reduce_sum(
            world, [not thread.is_alive(), bool(errors) and not cancel.is_set(), stop.received]
        )
        if failed or stopped:
            own = errors[0] if errors and not stopped else None  # before the cancelling adds one that hides the cause
            cancel.set()
            thread.join()
            distributed.raise_on_all_ranks(world, own)
            return False
        if finished == world.size:
            break
        if time.monotonic() - told > _TELL_SECONDS:
            say(f"{len(recorded_units(job)):,} of {len(job.units):,} units are prepared")
            told = time.monotonic()
    summary = distributed.run_on_all_ranks(world, lambda: finalize_job(job) if world.is_main else None)
    for line in describe_tokens(summary) if summary is not None else ():
        say(line)
    return True


def _estimate(job: Job) -> Estimate:
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "tokenizer.json"
        job.tokenizer.backend_tokenizer.save(str(file))
        reading = replace(job.work_settings().reading, scratch=scratch)
        return estimate_output(job.units, reading, Encoder(str(file), job.dtype, special=job.special), job.dtype)


def _cache(config: Config) -> Path:
    given = config.data.text.cache
    return user_path(given, "data.text.cache") if given is not None else run_folder(config).parent / CACHE_FOLDER


def _name_of(job: Job, path: str, sums: Sums) -> str:
    """Name the folder in the cache: readable, and unique for content, tokenizer and settings."""
    settings = {name: value for name, value in job.settings.items() if name != "inputs"}
    if job.skip_bad_documents:
        settings["on_bad_document"] = "skip"
    content = [sums[file.path][2] for file in job.inputs.files]
    key = xxhash.xxh3_64_hexdigest(json.dumps([content, job.vocabulary.sha256, settings], sort_keys=True).encode())
    label = re.sub(r"[^\w.-]+", "-", Path(path).name).strip("-.") or "text"
    return f"{label}-{key}"


def _known_sums(cache: Path, files: Sequence[InputFile]) -> Sums:
    """Read the sums of those files that are as they were when they were last read."""
    recorded = _read_sums(cache)
    return {
        file.path: recorded[file.path]
        for file in files
        if file.path in recorded and recorded[file.path][:2] == [file.size, file.mtime_ns]
    }


def _read_sums(cache: Path) -> Sums:
    try:
        return json.loads((cache / _SUMS).read_text())
    except (OSError, ValueError):
        return {}


def _sum_of(file: InputFile) -> list[Any]:
    content = file.revision or file_hash(Path(file.path))
    return [file.size, file.mtime_ns, content]


def _is_prepared(folder: Path) -> bool:
    """Tell whether a preparation was finished: the manifest of the training split is written last."""
    return (split_folder(folder, "train") / MANIFEST).is_file()


def _size(job: Job) -> str:
    count = len(job.inputs.files)
    size = f", {human_bytes(job.inputs.size)}" if job.inputs.size else ""
    return f"{count:,} file{'s' if count > 1 else ''}{size}"
