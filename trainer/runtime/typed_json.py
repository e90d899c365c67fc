"""JSON whose types are known: a dataclass says what a record holds, and what does not fit names its field."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

T = TypeVar("T")
Integer = Annotated[int, Field(strict=True, gt=-(2**63), lt=2**63)]
Count = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Seconds = Annotated[float, Field(strict=True, ge=0, lt=1e11, allow_inf_nan=False)]
"""Since 1970, or left: what a date and a duration of Python can hold."""
Pid = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
_SHOWN_CHARACTERS = 60


def as_type(kind: type[T], value: Any) -> T:
    """Make a dataclass of what json.loads returned.

    Args:
        kind: a dataclass; numbers are annotated with the types above. Fields that it does not know are left out unless
            its `__pydantic_config__` forbids them.

    Raises:
        ValueError: for the first field that does not fit, with its path and value.
    """
    try:
        return _adapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        path = ".".join(map(str, first["loc"])) or "all of it"
        found = repr(first["input"])
        shown = found if len(found) <= _SHOWN_CHARACTERS else f"{found[:_SHOWN_CHARACTERS]}…"
        message = first["msg"].replace("Input should", "should").replace("Field required", "is missing")
        raise ValueError(f"{path} {message[:1].lower()}{message[1:]}, and is {shown}") from None


@cache
def _adapter(kind: type) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
