"""YAML and JSON that users write or bring: read within bounds, with one card for whatever cannot be read.

Neither is trusted: a few lines of YAML can stand for 10^8 values (aliases of aliases), brackets can be nested deeper
than Python's stack, and numbers can have more digits than Python converts. YAML here has texts, numbers, booleans,
null, lists and mappings; a date or a time of day (`24:00:00`, a number in base 60 for YAML 1.1) is a text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import yaml

from trainer.errors import UserError
from trainer.runtime.plain_text import one_line, shorten

_MAX_YAML_BYTES = 4 << 20
_MAX_JSON_BYTES = 256 << 20  # a tokenizer.json has some ten MB
_MAX_NODES = 200_000
_MAX_DEPTH = 64
_MAX_NUMBER = 10**100
_TAG = "tag:yaml.org,2002:"
_KINDS = ("null", "bool", "int", "float", "str", "seq", "map")
_INT = re.compile(r"^[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]*|[1-9][0-9_]*)$")
# 6e-4 is a number, too (YAML 1.1 alone takes it for a text).
_FLOAT = re.compile(
    r"^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
    r"|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN))$"
)


def parse_yaml(text: str, where: str, remedy: str, place: str = "") -> Any:
    """Read one YAML document; None for an empty one.

    Args:
        where, remedy: for the card.
        place: what else the problem is to say of where the text stands.

    Raises:
        UserError: for all that is no YAML, or more of it than a person writes.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_size(node)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        problem = "it is nested too deeply"
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = ", ".join(filter(None, (error.context, error.problem)))
        problem = f"{said} (line {mark.line + 1}, column {mark.column + 1})" if mark else said
    except yaml.YAMLError as error:
        problem = str(error)
    except (ValueError, KeyError, IndexError, TypeError, OverflowError) as error:  # PyYAML's own, of `!!int ""`, `0x_`
        problem = f"a number has too many digits, or a value is not what its tag says ({error})"
    raise UserError(f"Not valid YAML{place}: {shorten(one_line(problem), 400)}.", where=where, remedy=remedy)


def read_text(path: Path, limit: int, where: str, remedy: str) -> str:
    """Read a file of text, without a byte order mark.

    Args:
        limit: bytes; a larger file is refused.
        where, remedy: for the card.

    Raises:
        UserError: when it is not UTF-8, too long, or cannot be read.
    """
    try:
        size = path.stat().st_size
        if size <= limit:
            return path.read_text(encoding="utf-8-sig")
        problem = f"'{path}' has {size:,} bytes, more than the {limit:,} that are read."
    except OSError as error:
        problem = f"Cannot read '{path}': {error.strerror}."
    except UnicodeDecodeError as error:
        problem = f"'{path}' is not UTF-8: {error.reason} at byte {error.start:,}."
    raise UserError(problem, where=where, remedy=remedy)


def read_yaml(path: Path, where: str = "", remedy: str = "Correct the file.") -> Any:
    """Read a YAML file.

    Args:
        where, remedy: for the card; by default the path, and to correct it.

    Raises:
        UserError: as `parse_yaml`, and when it is not UTF-8, too long, or cannot be read.
    """
    return _read(path, _MAX_YAML_BYTES, parse_yaml, where, remedy)


def parse_json(text: str, where: str, remedy: str, place: str = "") -> Any:
    """Read a JSON value; arguments as of `parse_yaml`.

    Raises:
        UserError: for all that is no JSON, for nesting that nobody means, and for numbers with thousands of digits.
    """
    try:
        value = json.loads(text)
        _check_depth(value)
        return value
    except RecursionError:
        problem = "it is nested too deeply"
    except ValueError as error:
        problem = str(error)
    raise UserError(f"Not valid JSON{place}: {shorten(one_line(problem), 400)}.", where=where, remedy=remedy)


def read_json(path: Path, where: str = "", remedy: str = "Correct the file.") -> Any:
    """Read a JSON file.

    Args:
        where, remedy: for the card; by default the path, and to correct it.

    Raises:
        UserError: as `parse_json`, and when it is not UTF-8, too long, or cannot be read.
    """
    return _read(path, _MAX_JSON_BYTES, parse_json, where, remedy)


def to_yaml(value: Any) -> str:
    """Write YAML that `parse_yaml` reads as the same value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=120)


def _read(path: Path, limit: int, parse: Callable[[str, str, str, str], Any], where: str, remedy: str) -> Any:
    """Parse a file; the card of a mistake has the path in its place, or in its problem where another place is given."""
    place, where = f" in '{path}'" if where else "", where or str(path)
    return parse(read_text(path, limit, where, remedy), where, remedy, place)


def _check_size(root: yaml.Node) -> None:
    """Refuse aliases that go round in a circle, and more values than `_MAX_NODES` when all aliases are written out."""
    sizes: dict[int, int | None] = {}

    def size_of(node: yaml.Node, depth: int) -> int:
        known = sizes.get(id(node), 0)
        if known is None:
            raise yaml.MarkedYAMLError(problem="an alias refers to what it stands in", problem_mark=node.start_mark)
        if known:
            return known
        if depth > _MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem="it is nested too deeply", problem_mark=node.start_mark)
        sizes[id(node)] = None
        inner: list[Any] = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for item in inner for part in (item if isinstance(item, tuple) else (item,))]
        size = 1 + sum(size_of(part, depth + 1) for part in parts)
        if size > _MAX_NODES:
            problem = f"it stands for more than {_MAX_NODES:,} values"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        sizes[id(node)] = size
        return size

    size_of(root, 1)


def _check_depth(value: Any) -> None:
    """Refuse lists and objects that are nested deeper than `_MAX_DEPTH`: what reads them later is recursive."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > _MAX_DEPTH:
            raise RecursionError
        inner = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, dict | list)]
        level = [part for parts in inner for part in parts if isinstance(part, dict | list)]


class _Loader(yaml.SafeLoader):
    """SafeLoader for what a config may hold: no dates, no numbers in base 60, no other tags, no key twice."""

    yaml_constructors = {  # noqa: RUF012
        **{f"{_TAG}{kind}": yaml.SafeLoader.yaml_constructors[f"{_TAG}{kind}"] for kind in _KINDS},
        None: yaml.SafeLoader.yaml_constructors[None],
    }
    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in known if tag.rpartition(":")[2] in ("null", "bool", "merge")]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value = super().construct_yaml_int(node)
        if abs(value) > _MAX_NUMBER:
            raise yaml.MarkedYAMLError(problem="a number has too many digits", problem_mark=node.start_mark)
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == f"{_TAG}merge":
                continue
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            if not isinstance(key, Hashable):
                continue  # refused below
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key '{shorten(str(key))}' appears twice", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes a text which the loader would take for a number."""


_Loader.add_constructor(f"{_TAG}int", _Loader.construct_yaml_int)
_Loader.add_implicit_resolver(f"{_TAG}int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+0123456789."))
_Dumper.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+0123456789."))
