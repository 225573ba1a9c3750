"""What objectives and estimators share: frozen, validated options, some of which may be schedules."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, get_args

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


class Schedule(BaseModel):
    """A number that moves from `start` to `end` over the first `steps` optimiser steps and then stays.

    With t = min(step / steps, 1):
    linear       start + (end - start) t
    cosine       end + (start - end) (1 + cos(pi t)) / 2
    exponential  start (end / start)^t, both of the same sign

    Raises:
        pydantic.ValidationError: unknown kind, steps < 1, or an exponential one that would touch zero.

    Example:
        >>> Schedule(schedule="linear", start=0.0, end=1.0, steps=10).at(5)
        0.5
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    schedule: Literal["linear", "cosine", "exponential"]
    start: float
    end: float
    steps: int = Field(ge=1)

    @model_validator(mode="after")
    def _exponential_needs_one_sign(self) -> Self:
        if self.schedule == "exponential" and not self.start * self.end > 0:
            raise ValueError(
                f"an exponential schedule needs start and end of the same sign and not zero, "
                f"not {self.start} and {self.end}"
            )
        return self

    def at(self, step: int) -> float:
        """The value at an optimiser step, counted from 0."""
        t = min(max(step / self.steps, 0.0), 1.0)
        if self.schedule == "linear":
            return self.start + (self.end - self.start) * t
        if self.schedule == "cosine":
            return self.end + (self.start - self.end) * (1.0 + math.cos(math.pi * t)) / 2.0
        return float(self.start * (self.end / self.start) ** t)


def _reach(number: float | Schedule) -> tuple[float, float]:
    return (number.start, number.end) if isinstance(number, Schedule) else (number, number)


def _check_positive(number: float | Schedule) -> float | Schedule:
    if not min(_reach(number)) > 0:
        raise ValueError("Input should be greater than 0")
    return number


def _check_not_negative(number: float | Schedule) -> float | Schedule:
    if not min(_reach(number)) >= 0:
        raise ValueError("Input should be greater than or equal to 0")
    return number


Number = float | Schedule
"""Type of a numeric option that may be scheduled: an input of the compiled step, never a constant in it."""

Positive = Annotated[Number, AfterValidator(_check_positive)]
"""A `Number` above zero, at both ends if it is a schedule."""

NonNegative = Annotated[Number, AfterValidator(_check_not_negative)]
"""A `Number` of zero or more, at both ends if it is a schedule."""


class Algorithm(BaseModel):
    """Options of one algorithm; the class, its file and its name in a recipe are called the same.

    Types are strict (no "3" or True for a number); lists become tuples and NumPy scalars Python's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True)

    @model_validator(mode="before")
    @classmethod
    def _take_plain_values(cls, options: Any) -> Any:  # noqa: ANN401 - whatever the caller gave
        return (
            {name: _plain(value) for name, value in options.items()} if isinstance(options, dict) else options
        )

    def numbers(self) -> dict[str, float | Schedule]:
        """The options annotated `Number` (or `Positive`, `NonNegative`), by name.

        Example:
            >>> class tempered(Algorithm):
            ...     temperature: Number = 1.0
            ...     draws: int = 1
            >>> tempered().numbers()
            {'temperature': 1.0}
        """
        values = {
            name: getattr(self, name)
            for name, field in type(self).model_fields.items()
            if Schedule in get_args(field.annotation)
        }
        return {name: value for name, value in values.items() if value is not None}

    def with_numbers(self, values: Mapping[str, Any]) -> Self:
        """A copy with these options; the values are not checked, so traced arrays pass."""
        return self.model_copy(update=values)


def _plain(value: object) -> object:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list):
        return tuple(_plain(item) for item in value)
    return value


class Objective(Algorithm):
    """What is optimised, an expectation over draws of the guide: `draws` per row, `outer` of the globals."""

    draws: int = Field(default=1, ge=1)
    outer: int = Field(default=1, ge=1)


class Estimator(Algorithm):
    """How the draw of a site carries gradient to the guide's parameters."""
