"""Where the text of a row is: a field by its name, or a nested one by its path."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tools.prepare.option_names import OptionNames
from trainer.errors import UserError, nearest

MISSING = object()


def value_at(row: Mapping[str, Any], field: str) -> Any:
    """Get the value of a field, or MISSING. A name with dots is a path where the row has no field of that very name."""
    if field in row:
        return row[field]
    return follow(row, field, lambda part, name: part[name] if isinstance(part, Mapping) and name in part else MISSING)


def follow(start: Any, field: str, step: Callable[[Any, str], Any]) -> Any:
    """Go along a path of names with dots between them; a name may hold dots itself, and longer names come first.

    Args:
        step: from a part and a name to the part within it, or MISSING.
    """
    names = field.split(".")
    for count in range(len(names), 0, -1):
        found = step(start, ".".join(names[:count]))
        if found is MISSING:
            continue
        found = found if count == len(names) else follow(found, ".".join(names[count:]), step)
        if found is not MISSING:
            return found
    return MISSING


def missing_field(where: str, field: str, fields: Sequence[str], names: OptionNames, hint: str = "") -> UserError:
    """Make the error for a field that is not there."""
    return UserError(
        f"No field '{field}' in {where}.{nearest(field, list(fields))}",
        where=names("field", field),
        remedy=f"Its fields are: {', '.join(map(str, fields)) or 'none'}.{hint}",
    )


def not_text_remedy(field: str, value: Any, names: OptionNames) -> str:
    """Say what to do about a field that holds something else; a field within it is named."""
    inner = f", such as {names('field', f'{field}.{next(iter(value))}')}" if isinstance(value, dict) and value else ""
    return f"Name the field that holds the text with {names('field')}{inner}."
