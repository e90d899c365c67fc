"""What the sections of the run configuration have in common."""

from __future__ import annotations

import math
import typing
from types import UnionType
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from trainer.runtime.plain_text import has_control

# Beyond these a number is a slip, not a wish; below them all arithmetic holds: sample numbers fit int64, floats stay
# finite, nothing is made that large.
LIMIT = 2**48
LARGEST = 1e9
MOST_SEQUENCES = 2**24
MOST_MINUTES = 60 * 24 * 366

PositiveInt = Annotated[int, Field(gt=0, lt=LIMIT)]
NaturalInt = Annotated[int, Field(ge=0, lt=LIMIT)]
Sequences = Annotated[int, Field(gt=0, le=MOST_SEQUENCES)]
PositiveFloat = Annotated[float, Field(gt=0.0, le=LARGEST)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, le=LARGEST)]
Ratio = Annotated[float, Field(gt=1.0, le=LARGEST)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
OpenFraction = Annotated[float, Field(gt=0.0, lt=1.0)]
PositiveFraction = Annotated[float, Field(gt=0.0, le=1.0)]
Minutes = Annotated[float, Field(gt=0.0, le=MOST_MINUTES)]


def _one_line(text: str) -> str:
    """Refuse what opens a new line in a job script or moves a terminal's cursor, and a text without a character."""
    if not text.strip() or has_control(text):
        raise PydanticCustomError("one_line", "Input should be one line of text without control characters")
    return text


Line = Annotated[str, AfterValidator(_one_line)]
"""A name or a path."""
Name = Annotated[Line, Field(max_length=200)]


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise PydanticCustomError("finite_number", "Input should be a finite number")
    return value


def count_or_auto(most: int) -> BeforeValidator:
    """Make the check of a whole number from 1 to `most`, or auto."""

    def check(value: Any) -> Any:
        if value == "auto":
            return value
        if not isinstance(value, int) or isinstance(value, bool):
            raise PydanticCustomError("count_or_auto", "Input should be a whole number or auto")
        if value < 1:
            raise PydanticCustomError("count_or_auto", "Input should be greater than 0")
        if value > most:
            raise PydanticCustomError("count_or_auto", "Input should be less than or equal to {most}", {"most": most})
        return value

    return BeforeValidator(check)


StepsOrAuto = Annotated[int | Literal["auto"], count_or_auto(LIMIT - 1)]
"""So many steps, or as many as fit the length of the run (`trainer.schedule.run_length`)."""


ModelFields = dict[str, Annotated[Any, AfterValidator(_finite)]]
"""Fields of a Hugging Face config."""


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, serialize_by_alias=True
    )


def fields_by_key(section: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return the fields of a section by the keys of the file, which are not always names in Python (`async`)."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def section_in(annotation: Any) -> type[Section] | None:
    """Find the section that a field holds, alone or as `Section | None`; None where it holds none."""
    kinds = typing.get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)
