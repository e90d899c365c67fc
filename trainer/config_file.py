"""Reading a config: YAML with `extends`, overrides from the command line, and clear errors for what does not fit.

One YAML file describes a run. Unknown keys are errors that name the nearest known key, `extends` inherits from a
recipe or another file, and `a.b=c` on the command line overrides.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from trainer.config import Config, PhaseConfig, SourceConfig, StageConfig
from trainer.config_base import keys_of, section_in
from trainer.errors import UserError, nearest
from trainer.files import shipped

RECIPES = shipped("trainer", "recipes")
_MOVED = {"train.max_skipped_steps": "resilience.max_skipped_steps"}
_SECTIONS_IN_LISTS: dict[str, Any] = {"train": SourceConfig, "stages": StageConfig, "phases": PhaseConfig}
SectionType = TypeVar("SectionType", bound=BaseModel)


def load_config(source: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config by recipe name or path, apply `a.b=c` overrides, and validate it.

    Raises:
        UserError: for a missing file, bad YAML, an unknown key (with the nearest known one), a value out of range.
    """
    raw = _read_with_parents(find_config(source), seen=())
    for override in overrides:
        _apply_override(raw, override)
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
    """The config as YAML, every default spelled out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=120)


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def find_config(source: str | Path, relative_to: Path | None = None) -> Path:
    """The file behind a recipe name or a path (looked up beside `relative_to` first)."""
    for base in ([relative_to] if relative_to else []) + [Path()]:
        path = base / Path(source).expanduser()
        if path.is_file():
            return path
    if (RECIPES / f"{source}.yaml").is_file():
        return RECIPES / f"{source}.yaml"
    names = recipe_names()
    raise UserError(
        f"No config file or recipe '{source}'.{nearest(str(source), names)}",
        where=str(source),
        remedy=f"Give the path of a YAML file or one of the recipes: {', '.join(names)}.",
    )


def _read_with_parents(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    path = path.resolve()
    if path in seen:
        chain = " → ".join(p.name for p in (*seen, path))
        raise UserError(f"`extends` goes round in a circle: {chain}.", where=str(path), remedy="Break the circle.")
    raw = read_mapping(path, example="trainer/recipes/demo.yaml")
    parent = raw.pop("extends", None)
    if parent is None:
        return raw
    base = _read_with_parents(find_config(str(parent), relative_to=path.parent), (*seen, path))
    return _merge(base, raw)


def read_mapping(path: Path, example: str) -> dict[str, Any]:
    """A YAML file that holds a mapping, or nothing.

    Raises:
        UserError: when it does not; `example` is a file that does.
    """
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"Not valid YAML: {error}", where=str(path), remedy="Correct the file.") from None
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        raise UserError("A config is a mapping of sections.", where=str(path), remedy=f"See {example}.")
    return raw


# Where exactly one of several keys may be set, setting one in a child replaces the parent's choice.
_ALTERNATIVES = (
    ("model", ("preset", "config", "from_pretrained")),
    ("train", ("steps", "tokens", "epochs")),
)


def _merge(base: dict[str, Any], child: dict[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(base)
    for section, names in _ALTERNATIVES:
        section_of_child = child.get(section)
        if isinstance(section_of_child, dict) and any(section_of_child.get(name) is not None for name in names):
            for name in names if isinstance(merged.get(section), dict) else ():
                merged[section].pop(name, None)
    _merge_into(merged, child)
    return merged


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
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"Not a YAML value: {error}", where=override, remedy="Quote the value.") from None
    parts = key.split(".")
    for section, names in _ALTERNATIVES:
        if parts[0] == section and parts[-1] in names and len(parts) == 2 and value is not None:
            for name in names:
                if isinstance(raw.get(section), dict) and name != parts[1]:
                    raw[section].pop(name, None)
    place = raw
    for part in parts[:-1]:
        if not isinstance(place.get(part), dict):
            place[part] = {}
        place = place[part]
    place[parts[-1]] = value


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and reads 6e-4 as a number (YAML 1.1 alone takes it for a string)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in own]  # type: ignore[no-untyped-call]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.MarkedYAMLError(problem=f"key '{key}' appears twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _as_user_error(error: ValidationError, root: type[BaseModel], source: str, described_in: str) -> UserError:
    problems, keys = [], []
    for item in error.errors():
        path = [str(part) for part in item["loc"]]
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
            problems.append(f"Key '{key}' {message}, got {item['input']!r}.")
    return UserError(
        " ".join(dict.fromkeys(problems)),
        where=", ".join(dict.fromkeys(filter(None, keys))) or source,
        remedy=f"Correct it in {source} or on the command line; every key is described in {described_in}.",
    )


def _known_keys(root: type[BaseModel], path: list[str]) -> list[str]:
    place: Any = root
    for part in path:
        if part.isdigit():
            continue
        field = keys_of(place).get(part) if isinstance(place, type) and issubclass(place, BaseModel) else None
        annotation = field.annotation if field else None
        place = _SECTIONS_IN_LISTS.get(part) if "list" in str(annotation) else section_in(annotation)
    is_section = isinstance(place, type) and issubclass(place, BaseModel)
    return sorted(keys_of(place)) if is_section else []
