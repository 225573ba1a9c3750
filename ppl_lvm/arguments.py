"""Arguments of `fit` that are of the wrong kind, told before anything is done with them."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

from ppl_lvm.errors import BackendError, DataError, PplLvmError, ProgramError, RecipeError
from ppl_lvm.posterior import Fit, State
from ppl_lvm.recipe import Recipe


def check_kinds(seed: Any, device: Any, observed: Any, state: Any, start: Any, callbacks: Any) -> None:
    """Refuses arguments of other kinds than `fit` documents.

    Raises:
        DataError, BackendError, ProgramError, PplLvmError: what was given, and what is taken.
    """
    try:
        operator.index(seed)
    except TypeError:
        raise DataError(f"seed is {seed!r}; give a whole number.") from None
    if not (device is None or isinstance(device, str)):
        raise BackendError(f"device is {device!r}; give a name, as in 'cpu', 'gpu' or 'cuda:1'.")
    if not (observed is None or isinstance(observed, Mapping)):
        raise ProgramError(f"observed is {observed!r}; give a mapping of sites to data arguments, {{'obs': 'x'}}.")
    if not (state is None or isinstance(state, State)):
        raise DataError(f"state is {state!r}; give the state of an earlier fit, run.state or State.load(path).")
    if not (start is None or isinstance(start, Fit | Mapping)):
        raise DataError(f"start is {start!r}; give an earlier fit, or values of parameters by name.")
    if not isinstance(callbacks, Iterable):
        raise PplLvmError(f"callbacks is {callbacks!r}; give a list of functions, [f].")
    for each in callbacks:
        if not callable(each):
            raise PplLvmError(f"callbacks holds {each!r}, which cannot be called; give functions of a Moment.")


def check_loop(how: Recipe, of_loop: Mapping[str, object]) -> None:
    """Refuses arguments of the loop beside a method."""
    found = [f"{name}=" for name, value in of_loop.items() if value is not None]
    if found and how.method is not None:
        raise RecipeError(
            f"{', '.join(found)} was given, but recipe {how.name!r} has a method, which has no steps to go on from or "
            f"to look at; leave it out."
        )
