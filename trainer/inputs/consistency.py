"""Do all ranks start from the same? What each of them reads for itself is compared when they have met.

Ranks read the config, its files and the data on their own, on machines of their own. Those that differ would train
together without a word, each with numbers of its own, or wait for each other for good. Nothing may differ: the command,
the config as it is resolved, the code, the versions of the libraries that compute, and what the paths lead to.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any

import xxhash

from trainer.config import Config
from trainer.data.manifest import MANIFEST, split_folder
from trainer.engine.deepspeed_config import load_preset
from trainer.errors import HangError, MaskwrightError, UserError, mark_origin
from trainer.inputs.inputs import Inputs
from trainer.model.source import tokenizer_source
from trainer.runtime import distributed
from trainer.runtime.distributed import World
from trainer.runtime.files import file_hash
from trainer.runtime.paths import is_local, user_path
from trainer.runtime.plain_text import listed
from trainer.runtime.process import node_name
from trainer.runtime.versions import installed_version

_LIBRARIES = ("torch", "deepspeed", "transformers", "tokenizers", "numpy")
_PACKAGES = ("launcher", "tools", "trainer")
_GENERATOR = "objective.generator.from_pretrained"
_MODEL_FILES = ("*.json", "*.txt", "*.model", "*.safetensors", "*.bin")
_WHOLE_BYTES = 32 << 20  # a file up to this size is hashed as a whole, of a larger one some parts are
_PART_BYTES, _PARTS = 64 << 10, 64
_SHOWN_KEYS, _SHOWN_VALUES, _SHOWN_NODES, _SHOWN_RANGES, _SHOWN_CHARACTERS = 8, 4, 4, 8, 100


def compare(world: World, read: Callable[[], Mapping[str, Any]]) -> None:
    """Go on only when `read` finds the same on all ranks; every rank calls it.

    Args:
        read: what this rank has found, by name, in values of JSON.

    Raises:
        UserError: on every rank, with the names, the values and the ranks that have them.
        MaskwrightError: on every rank, what `read` raised on one.
    """
    facts, error = {}, None
    try:
        facts = _flat(read())
    except Exception as caught:
        error = caught
    distributed.raise_on_all_ranks(world, error)
    digest = xxhash.xxh3_128_hexdigest(json.dumps(facts, sort_keys=True).encode())
    if len(set(distributed.all_gather(world, digest))) > 1:
        difference = _difference(distributed.all_gather(world, facts), distributed.all_gather(world, node_name()))
        mark_origin(difference, 0)  # one card, not one from each rank
        raise difference


def tell_others(error: MaskwrightError) -> None:
    """Meet the other ranks only to end them all: this one cannot read its config, and they would wait for it.

    Raises:
        MaskwrightError: on every rank, the error of the first one that has one.
    """
    try:
        world = distributed.start()
    except HangError:  # nobody waits for it
        raise error from None
    try:
        distributed.raise_on_all_ranks(world, error)  # the first thing that the others do as well, in `compare`
    finally:
        distributed.stop()


def facts_of_start(config: Config, resume: str, dry_run: bool) -> dict[str, Any]:
    """Collect what a rank has read before it does anything: command, config, code, and the files that it names."""
    return {
        **config.model_dump(mode="json"),
        "--resume": resume,
        "--dry-run": dry_run,
        "version of maskwright": f"{installed_version('maskwright')}, sources {_sources_hash()}",
        **{f"version of {name}": installed_version(name) for name in _LIBRARIES},
        f"deepspeed={config.deepspeed}": load_preset(config.deepspeed),
        **_model_files(config),
        **_data_sets(config),
        **_labelled_texts(config),
    }


def facts_of_inputs(inputs: Inputs) -> dict[str, Any]:
    """Collect what is known once the inputs are open: prepared text and names on the hub have become files by then."""
    config, vocabulary = inputs.config, inputs.vocabulary
    sources = zip(config.data.train, inputs.sources, strict=True)
    names = {**_models(config), "model.tokenizer": tokenizer_source(config)}
    return {
        "tokenizer": {"sha256": vocabulary.sha256, "size": vocabulary.size, "special ids": vocabulary.special_ids},
        "fingerprints": [f"{settings.path} {source.fingerprint}" for settings, source in sources],
        "data.validation": inputs.validation.fingerprint if inputs.validation is not None else None,
        "deepspeed": inputs.ds_config,
        "train.steps": inputs.plan.total_steps,
        "revision on the hub": {key: _revision(name) for key, name in names.items() if name and not is_local(name)},
    }


@cache
def _sources_hash() -> str:
    """Hash our own source files, by their names, with xxh3: finds other code whatever version it calls itself."""
    top, digest = Path(__file__).parents[2], xxhash.xxh3_64()
    for package in _PACKAGES:
        for path in sorted((top / package).rglob("*.py")):
            digest.update(str(path.relative_to(top)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _models(config: Config) -> dict[str, str | None]:
    """List what the config reads weights from, by its keys."""
    layers, teacher, generator = config.model.layers_from, config.objective.teacher, config.objective.generator
    return {
        "model.from_pretrained": config.model.from_pretrained,
        "model.layers_from.model": layers.model if layers is not None else None,
        "objective.teacher.model": teacher.model if teacher is not None else None,
        _GENERATOR: generator.from_pretrained if generator is not None else None,
    }


def _model_files(config: Config) -> dict[str, str]:
    """List the local files behind the keys of the model and its tokenizer, with size and hash."""
    found: dict[str, str] = {}
    model = config.model
    for key, name in {"model.tokenizer": model.tokenizer, "model.config": model.config, **_models(config)}.items():
        if name and is_local(name):
            path = user_path(name, key)
            files = [path] if path.is_file() else [file for kind in _MODEL_FILES for file in sorted(path.glob(kind))]
            if config.model.code and key != "model.tokenizer":
                files += sorted((path.parent if path.is_file() else path).glob("*.py"))
            found |= {f"{key}={name}: {file.name}": _identity(file) for file in files} or {f"{key}={name}": "missing"}
    return found


def _data_sets(config: Config) -> dict[str, str]:
    """List the manifests behind the paths of data, by their hash: they hold the hashes of all other files."""
    paths = [(source.path, "train") for source in config.data.train]
    if config.data.validation_path is not None:
        paths.append((config.data.validation_path, "validation"))
    found = {}
    for path, split in paths:
        manifest = split_folder(path, split) / MANIFEST
        there = "no data set" if manifest.parent.exists() else "missing"
        found[f"data {path} ({split})"] = _identity(manifest) if manifest.is_file() else there
    return found


def _labelled_texts(config: Config) -> dict[str, str]:
    if (probe := config.eval.probe) is None:
        return {}
    return {f"eval.probe.path={probe.path}": _identity(user_path(probe.path, "eval.probe.path"))}


def _identity(path: Path) -> str:
    """Give size and xxh3_128 of a file; of a large one, parts from its start to its end are hashed, to cost little.

    Other weights of the same shapes have the same header, so the start alone would not do.
    """
    try:
        size = path.stat().st_size
        if size <= _WHOLE_BYTES:
            return f"{size:,} bytes, {file_hash(path)}"
        digest = xxhash.xxh3_128()
        with open(path, "rb") as file:
            for part in range(_PARTS):
                file.seek((size - _PART_BYTES) * part // (_PARTS - 1))
                digest.update(file.read(_PART_BYTES))
        return f"{size:,} bytes, parts {digest.hexdigest()}"
    except OSError as error:  # where no rank can read it, opening it says so
        return f"not readable: {error.strerror}"


def _revision(name: str) -> str | None:
    """Find the commit of a name on the hub that lies in this machine's cache."""
    from huggingface_hub import try_to_load_from_cache

    for file in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        path = try_to_load_from_cache(name, file)
        if isinstance(path, str):
            return Path(path).parent.name
    return None


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Flatten nested values to dotted names, as errors in a config name keys."""
    if isinstance(value, Mapping):
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list | tuple) and any(isinstance(each, Mapping) for each in value):
        items = enumerate(value)
    else:
        return {name: value}
    inner = {key: found for part, each in items for key, found in _flat(each, f"{name}.{part}".lstrip(".")).items()}
    return inner or {name: value}


def _difference(facts: list[dict[str, Any]], nodes: list[str]) -> UserError:
    """Make the error that says what differs, by name: each value with the ranks that have it."""
    names = dict.fromkeys(name for found in facts for name in found)
    values = {name: [_text(found[name]) if name in found else "nothing" for found in facts] for name in names}
    different = [name for name in names if len(set(values[name])) > 1]
    lines = [f"{name} is {_by_rank(values[name], nodes)}" for name in different[:_SHOWN_KEYS]]
    if len(different) > _SHOWN_KEYS:
        lines.append(f"and {len(different) - _SHOWN_KEYS:,} more")
    return UserError(
        "The ranks do not start from the same, so nothing was trained.",
        where="; ".join(lines),
        remedy="Start every rank with the same command, config, files, code and versions of the libraries.",
    )


def _by_rank(values: list[str], nodes: list[str]) -> str:
    """Say which ranks have which value: `0.1 on ranks 0-3 (node-a), 0.2 on rank 4 (node-b)`."""
    kinds, shown = list(dict.fromkeys(values)), []
    alike = sum(1 for _ in takewhile(lambda letters: len(set(letters)) == 1, zip(*kinds, strict=False)))
    for kind in kinds[:_SHOWN_VALUES]:
        ranks = [rank for rank, value in enumerate(values) if value == kind]
        places = list(dict.fromkeys(nodes[rank] for rank in ranks))
        shown.append(f"{_cut(kind, alike)} on {_ranges(ranks)} ({listed(places, _SHOWN_NODES)})")
    if len(kinds) > _SHOWN_VALUES:
        shown.append(f"{len(kinds) - _SHOWN_VALUES:,} other values elsewhere")
    return ", ".join(shown)


def _ranges(ranks: list[int]) -> str:
    """Write ranks as ranges: `ranks 0-3, 8`."""
    places = {rank: place for place, rank in enumerate(ranks)}
    runs = [list(run) for _, run in groupby(ranks, key=lambda rank: rank - places[rank])]
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return f"rank{'s' if len(ranks) > 1 else ''} {listed(parts, _SHOWN_RANGES)}"


def _text(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isprintable() else json.dumps(value)


def _cut(text: str, alike: int) -> str:
    """Cut a text to what fits into a line; of a long one keep the part where it begins to differ from the others."""
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    start = max(0, min(alike - _SHOWN_CHARACTERS // 4, len(text) - _SHOWN_CHARACTERS))
    end = start + _SHOWN_CHARACTERS
    return f"{'…' if start else ''}{text[start:end]}{'…' if end < len(text) else ''}"
