"""Reading a config: YAML with `extends`, overrides from the command line, and clear errors for what does not fit.

One YAML file describes a run. Unknown keys are errors that name the nearest known key, `extends` inherits from a
recipe or another file, and `a.b=c` on the command line overrides.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from trainer.config import Config, MaskRatioStage, PhaseConfig, SourceConfig, StageConfig
from trainer.config.base import fields_by_key, section_in
from trainer.config.objective import KINDS
from trainer.config.schedule import DECAYS, WARMUPS
from trainer.errors import UserError, nearest
from trainer.runtime.files import shipped
from trainer.runtime.paths import check_reachable, expanded, real_path
from trainer.runtime.plain_text import shorten
from trainer.runtime.user_files import parse_yaml, read_yaml, to_yaml

RECIPES = shipped("trainer", "recipes")
_MOST_LEVELS = 16
_PROBLEMS_SHOWN = 5
_MOVED = {"train.max_skipped_steps": "resilience.max_skipped_steps"}
_SECTIONS_IN_LISTS: dict[str, Any] = {
    "train": SourceConfig,
    "stages": StageConfig,
    "phases": PhaseConfig,
    "mask_ratio": MaskRatioStage,
}
SectionType = TypeVar("SectionType", bound=BaseModel)


def load_config(source: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config by recipe name or path, apply `a.b=c` overrides, and validate it.

    Raises:
        UserError: for a missing file, bad YAML, an unknown key (with the nearest known one), a value out of range.
    """
    raw = _read_with_parents(find_config(source), seen=())
    for override in overrides:
        _apply_override(raw, override)
    model = raw.get("model")
    if isinstance(model, dict) and isinstance(model.get("tokenizer"), _OfRecipe):
        model["tokenizer"] = str(model["tokenizer"])
    return parse_config(raw, str(source))


def parse_config(raw: dict[str, Any], source: str) -> Config:
    """Validate a plain dict; `source` is named in the error."""
    return validate_section(Config, raw, source, "docs/config.md")


def validate_section(section: type[SectionType], raw: Any, source: str, described_in: str) -> SectionType:
    """Validate a plain dict as a section, or as all of a file; `source` and `described_in` are named in the error."""
    try:
        return section.model_validate(raw)
    except ValidationError as error:
        raise _as_user_error(error, section, source, described_in) from None


def dump_config(config: Config) -> str:
    """Write the config as YAML, every default spelled out."""
    return to_yaml(config.model_dump(mode="json"))


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def find_config(source: str | Path, relative_to: Path | None = None) -> Path:
    """Find the file behind a recipe name or a path (looked up beside `relative_to` first)."""
    where = "extends" if relative_to else ""
    given = expanded(source, where)
    for base in ([relative_to] if relative_to else []) + [Path()]:
        check_reachable(base / given, source, where)
        if (base / given).is_file():
            return base / given
    if (RECIPES / f"{source}.yaml").is_file():
        return RECIPES / f"{source}.yaml"
    names = recipe_names()
    raise UserError(
        f"No config file or recipe '{source}'.{nearest(str(source), names)}",
        where=str(source),
        remedy=f"Give the path of a YAML file or one of the recipes: {', '.join(names)}.",
    )


def names_config(source: str) -> bool:
    """Tell whether an argument is a config or a recipe, where it may also be a folder."""
    return source in recipe_names() or expanded(source, "").is_file() or source.endswith((".yaml", ".yml"))


def _read_with_parents(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    path = real_path(path)
    if path in seen:
        chain = " → ".join(p.name for p in (*seen, path))
        raise UserError(f"`extends` goes round in a circle: {chain}.", where=str(path), remedy="Break the circle.")
    raw = read_mapping(path, example="trainer/recipes/demo.yaml")
    parent, model = raw.pop("extends", None), raw.get("model")
    if path.parent == real_path(RECIPES) and isinstance(model, dict) and "tokenizer" in model:
        model["tokenizer"] = _OfRecipe(model["tokenizer"])
    if parent is None:
        return raw
    if not isinstance(parent, str):
        remedy = "Write one name: `extends: roberta-base`."
        problem = f"`extends` is the name of one file or recipe, got {shorten(repr(parent))}."
        raise UserError(problem, where=str(path), remedy=remedy)
    base = _read_with_parents(find_config(parent, relative_to=path.parent), (*seen, path))
    return _merge(base, raw)


def read_mapping(path: Path, example: str) -> dict[str, Any]:
    """Read a YAML file that holds a mapping, or nothing.

    Raises:
        UserError: when it does not, or cannot be read; `example` is a file that does.
    """
    raw = read_yaml(path)
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        raise UserError("A config is a mapping of sections.", where=str(path), remedy=f"See {example}.")
    return raw


# Where only one of several keys may be set, setting one in a child replaces the parent's choice.
_ALTERNATIVES = (
    ("model", ("preset", "config", "from_pretrained")),
    ("train", ("steps", "tokens", "epochs")),
    ("schedule", WARMUPS),
    ("schedule", DECAYS),
)


def _merge(base: dict[str, Any], child: dict[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(base)
    for section, names in _ALTERNATIVES:
        section_of_child = child.get(section)
        if isinstance(section_of_child, dict) and any(section_of_child.get(name) is not None for name in names):
            _drop_alternatives(merged, section, names, section_of_child)
    _merge_into(merged, child)
    return merged


class _OfRecipe(str):
    """The tokenizer that a recipe names, which nobody has chosen: it gives way to a checkpoint's own."""


def _drop_alternatives(raw: dict[str, Any], section: str, names: Sequence[str], chosen: Mapping[str, Any]) -> None:
    """Make room for another choice."""
    place = raw.get(section)
    if not isinstance(place, dict):
        return
    for name in names:
        place.pop(name, None)
    if chosen.get("from_pretrained") is not None:
        place.pop("layers_from", None)  # of a model that begins with nothing else
        if isinstance(place.get("tokenizer"), _OfRecipe):
            del place["tokenizer"]


def _merge_into(target: dict[str, Any], child: dict[str, Any]) -> None:
    for key, value in child.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            _merge_into(target[key], value)
        else:
            target[key] = copy.deepcopy(value)


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(
            f"Not an override: '{override}'.",
            where=override,
            remedy="Write section.key=value, as in batch.micro_size=4.",
        )
    value = parse_yaml(text, override, "Quote the value.")
    parts = key.split(".")
    if len(parts) > _MOST_LEVELS:
        problem = f"No key has {len(parts):,} levels."
        raise UserError(problem, where=override, remedy="Write section.key=value, as in batch.micro_size=4.")
    for section, names in _ALTERNATIVES:
        if parts[0] == section and parts[-1] in names and len(parts) == 2 and value is not None:
            _drop_alternatives(raw, section, names, {parts[1]: value})
    place = raw
    for part in parts[:-1]:
        if not isinstance(place.get(part), dict):
            place[part] = {}
        place = place[part]
    place[parts[-1]] = value


def _as_user_error(error: ValidationError, root: type[BaseModel], source: str, described_in: str) -> UserError:
    problems, keys = [], []
    found = error.errors(include_url=False)
    for item in found[:_PROBLEMS_SHOWN]:
        path = [shorten(str(part)) for part in item["loc"] if part not in KINDS]
        key = ".".join(path)
        keys.append(key)
        if key in _MOVED:
            problems.append(f"Key '{key}' is now '{_MOVED[key]}'.")
        elif item["type"] == "extra_forbidden":
            known = _known_keys(root, path[:-1])
            hint = nearest(path[-1], known) or f" Known here: {', '.join(known)}."
            problems.append(f"Unknown key '{key}'.{hint}")
        elif item["type"] == "missing":
            problems.append(f"Key '{key}' is missing.")
        elif item["type"] == "value_error":
            subject = f"Section '{key}'" if key else "The config"  # where two sections do not fit each other
            problems.append(f"{subject} {item['msg'].removeprefix('Value error, ')}.")
        else:
            message = item["msg"].replace("Input should be", "must be", 1)
            problems.append(f"Key '{key}' {message}, got {_shown(item)}.")
    if len(found) > _PROBLEMS_SHOWN:
        problems.append(f"And {len(found) - _PROBLEMS_SHOWN:,} more.")
    return UserError(
        " ".join(dict.fromkeys(problems)),
        where=", ".join(dict.fromkeys(filter(None, keys))) or source,
        remedy=f"Correct it in {source} or on the command line; every key is described in {described_in}.",
    )


def _shown(item: Any) -> str:
    """Show the value that does not fit; for a number where a text is due, say how a text is written."""
    value = item["input"]
    quote = item["type"] == "string_type" and isinstance(value, bool | int | float)
    return shorten(repr(value)) + (" (a text in YAML if it stands in quotes)" if quote else "")


def _known_keys(root: type[BaseModel], path: list[str]) -> list[str]:
    place: Any = root
    for part in path:
        if part.isdigit():
            continue
        field = fields_by_key(place).get(part) if isinstance(place, type) and issubclass(place, BaseModel) else None
        annotation = field.annotation if field else None
        place = _SECTIONS_IN_LISTS.get(part) if "list" in str(annotation) else section_in(annotation)
    is_section = isinstance(place, type) and issubclass(place, BaseModel)
    return sorted(fields_by_key(place)) if is_section else []
