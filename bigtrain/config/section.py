"""What all sections of a config have in common."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError


def _positive_or_auto(value: Any) -> Any:
    if value == "auto" or (type(value) is int and value >= 1):
        return value
    raise PydanticCustomError("int_or_auto", "a positive whole number, or auto")


def _scale_or_dynamic(value: Any) -> Any:
    if value == "dynamic" or (type(value) in (int, float) and 1 <= value <= 1e38):
        return value
    raise PydanticCustomError("scale_or_dynamic", "dynamic, or a number from 1 to 1e38")


PositiveInt = Annotated[int, Field(ge=1)]
CountOrAuto = Annotated[
    int | Literal["auto"],
    BeforeValidator(_positive_or_auto),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"const": "auto"}]}),
]

ScaleOrDynamic = Annotated[
    float | Literal["dynamic"],
    BeforeValidator(_scale_or_dynamic),
    WithJsonSchema(
        {"anyOf": [{"type": "number", "minimum": 1, "maximum": 1e38}, {"const": "dynamic"}]}
    ),
]


class Section(BaseModel):
    """A section of the config: strict types, no unknown keys, immutable once read."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )
