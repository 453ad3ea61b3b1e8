"""The base of everything that strangers write: closed, frozen and strict tables of settings."""

from typing import Annotated, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from compressor.threat import parse_fraction


class ClosedTable(BaseModel):
    """Unknown keys, other types and non-finite numbers are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


_T = TypeVar("_T")
TupleOf = Annotated[tuple[_T, ...], BeforeValidator(_as_tuple)]
FractionText = Annotated[float, BeforeValidator(parse_fraction)]
Pixels = Annotated[FractionText, Field(gt=0, le=1)]
UnitFraction = Annotated[FractionText, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Side = Annotated[int, Field(ge=1, le=4096)]
"""Pixels; a slip of the finger must not fill the memory."""
