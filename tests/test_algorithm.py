"""Options of objectives and estimators: schedules, strict types, inputs of a compiled step."""

import math
from typing import Any

import numpy as np
import pytest
from pydantic import Field, ValidationError

from ppl_lvm.algorithm import Algorithm, NonNegative, Number, Objective, Positive, Schedule


class annealed(Objective):
    beta: NonNegative = 1.0
    temperature: Positive = 1.0
    clip: Number | None = None
    levels: tuple[int, ...] = ()
    gap: int = Field(default=1, ge=1)


def test_schedules_start_end_and_stay() -> None:
    for kind in ("linear", "cosine", "exponential"):
        schedule = Schedule(schedule=kind, start=4.0, end=1.0, steps=8)
        assert schedule.at(0) == 4.0
        assert schedule.at(8) == schedule.at(1000) == 1.0
        assert all(schedule.at(t) > schedule.at(t + 1) for t in range(8))
    assert Schedule(schedule="linear", start=0.0, end=2.0, steps=4).at(1) == 0.5
    assert Schedule(schedule="exponential", start=1.0, end=1e-4, steps=2).at(1) == pytest.approx(1e-2)
    assert Schedule(schedule="cosine", start=1.0, end=0.0, steps=4).at(1) == pytest.approx(
        (1 + math.cos(math.pi / 4)) / 2
    )


def test_an_exponential_schedule_cannot_touch_zero() -> None:
    with pytest.raises(ValidationError, match=r"same sign and not zero, not 1\.0 and 0\.0"):
        Schedule(schedule="exponential", start=1.0, end=0.0, steps=10)


def test_numbers_are_the_options_that_may_be_scheduled() -> None:
    warm_up = Schedule(schedule="linear", start=0.0, end=1.0, steps=10)
    assert annealed(beta=warm_up).numbers() == {"beta": warm_up, "temperature": 1.0}
    assert annealed(clip=5.0).numbers() == {"beta": 1.0, "temperature": 1.0, "clip": 5.0}


def test_traced_values_take_the_place_of_numbers() -> None:
    traced: Any = object()
    options = annealed(draws=7).with_numbers({"beta": traced})
    assert options.beta is traced
    assert options.draws == 7


@pytest.mark.parametrize(
    "options",
    [
        {"draws": 0},
        {"draws": "3"},
        {"draws": True},
        {"draws": 2.5},
        {"beta": "1"},
        {"beta": -0.1},
        {"beta": float("nan")},
        {"temperature": 0.0},
        {"temperature": {"schedule": "linear", "start": 1.0, "end": 0.0, "steps": 3}},
        {"draw": 3},
    ],
    ids=str,
)
def test_options_of_the_wrong_type_or_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        annealed(**options)


def test_numpy_scalars_integers_and_lists_are_taken_as_python_has_them() -> None:
    given: dict[str, Any] = {"draws": np.int64(5), "beta": 2, "levels": [1, 2]}
    options = annealed(**given)
    assert (options.draws, options.beta, options.levels) == (5, 2.0, (1, 2))
    assert type(options.draws) is int
    assert hash(options) == hash(annealed(draws=5, beta=2.0, levels=(1, 2)))


def test_options_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        annealed().draws = 3
    assert issubclass(annealed, Algorithm)
