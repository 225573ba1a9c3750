"""What a fit may be asked with: kinds of arguments, checked by name under every method that has them."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from ppl_lvm.errors import DataError

Method = TypeVar("Method", bound=Callable[..., Any])


def whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """A whole number in a range; one of NumPy's becomes Python's.

    Raises:
        DataError: it is none, or out of the range.
    """
    wanted = f"of {least:,} or more" if most is None else f"from {least:,} to {most:,}"
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise DataError(f"{name} is {value!r}; give a whole number {wanted}.") from None
    if number < least or (most is not None and number > most):
        raise DataError(f"{name} = {number}; give a whole number {wanted}.")
    return number


def _count(name: str, value: Any) -> int:
    return whole(name, value, 1)


def _from_zero(name: str, value: Any) -> int:
    return whole(name, value, 0)


def _number(name: str, value: Any) -> float:
    real = isinstance(value, int | float | np.number) and not isinstance(value, bool | np.complexfloating)
    if not real or not np.isfinite(float(value)):
        raise DataError(f"{name} is {value!r}; give a finite number.")
    return float(value)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise DataError(f"{name} is {value!r}; give True or False.")
    return bool(value)


def _by_site(name: str, value: Any) -> Any:
    if not isinstance(value, Mapping) or not all(isinstance(site, str) for site in value):
        raise DataError(f"{name} is {value!r}; give values by site, as in {{'z': 0.5}}.")
    return value


KINDS: dict[str, Callable[[str, Any], Any]] = {
    **dict.fromkeys(("draws", "particles", "rows"), _count),
    **dict.fromkeys(("seed", "predictive", "prior"), _from_zero),
    **dict.fromkeys(("values", "given"), _by_site),
    **dict.fromkeys(("threshold", "fill"), _number),
    **dict.fromkeys(("mean", "overwrite"), _flag),
}
"""How an argument of this name is read; None passes where it is the default."""


def checked(method: Method) -> Method:
    """The method with its arguments checked by name.

    Example:
        >>> class Asked:
        ...     @checked
        ...     def posterior(self, draws: int = 1000, seed: int = 0) -> int:
        ...         return draws
        >>> Asked().posterior(2.5)
        Traceback (most recent call last):
        ...
        ppl_lvm.errors.DataError: draws is 2.5; give a whole number of 1 or more.
    """
    signature = inspect.signature(method)
    defaults = {name: p.default for name, p in signature.parameters.items()}

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        for name, value in given.arguments.items():
            if name in KINDS and not (value is None and defaults[name] is None):
                given.arguments[name] = KINDS[name](name, value)
        return method(*given.args, **given.kwargs)

    return call  # type: ignore[return-value]
