"""Arguments of `fit` that are of the wrong kind, told before anything is done with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ppl_lvm.asking import whole
from ppl_lvm.errors import BackendError, DataError, PplLvmError, ProgramError, RecipeError
from ppl_lvm.posterior import Fit, State
from ppl_lvm.recipe import Recipe

MOST_SEED = 2**32 - 1
"""JAX takes no more of a seed without 64 bits, in silence."""


def check_kinds(
    seed: Any,
    device: Any,
    observed: Any,
    state: Any,
    start: Any,
    callbacks: Any,
    validation: Any,
    backend: Any,
    progress_bar: Any,
    **words: Any,
) -> None:
    """Refuses arguments of other kinds than `fit` documents; `words` are names, or None.

    Raises:
        DataError, BackendError, ProgramError, PplLvmError: what was given, and what is taken.
    """
    whole("seed", seed, 0, MOST_SEED)
    if not (device is None or isinstance(device, str)):
        raise BackendError(f"device is {device!r}; give a name, as in 'cpu', 'gpu' or 'cuda:1'.")
    if not (backend is None or isinstance(backend, str)):
        raise BackendError(f"backend is {backend!r}; give 'pyro' or 'numpyro'.")
    if not (progress_bar is None or isinstance(progress_bar, bool)):
        raise DataError(f"progress_bar is {progress_bar!r}; give True, False or None.")
    for name, word in words.items():
        if not (word is None or isinstance(word, str)):
            raise DataError(f"{name} is {word!r}; give a word in quotes, or leave it out.")
    pairs = observed.items() if isinstance(observed, Mapping) else [] if observed is None else [(observed, None)]
    if not all(isinstance(site, str) and isinstance(argument, str) for site, argument in pairs):
        raise ProgramError(f"observed is {observed!r}; give a mapping of sites to data arguments, {{'obs': 'x'}}.")
    if not (state is None or isinstance(state, State)):
        raise DataError(f"state is {state!r}; give the state of an earlier fit, run.state or State.load(path).")
    named = isinstance(start, Mapping) and all(isinstance(name, str) for name in start)
    if not (start is None or isinstance(start, Fit) or named):
        raise DataError(f"start is {start!r}; give an earlier fit, or values of parameters by name.")
    if isinstance(validation, bool):
        raise DataError(f"validation is {validation!r}; give a fraction of the rows, as in 0.1, or other data.")
    if not isinstance(callbacks, Iterable) or not getattr(callbacks, "shape", (1,)):
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
