"""What a computation on JAX would take of memory, without running it; and compiled code that is let go."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend.core import Jaxpr, Literal

from ppl_lvm.backends._jax_equations import inner

MOST_LEFT = 500
"""Compiled computations that may gather before they are let go, some 2 MB each."""


class Compiled:
    """JAX keeps what it has compiled for every operation and every shape that it has met, thousands of them.

    A process that fits data of ever other shapes would hold more and more, so all of it is let go now and then. What is
    needed again is compiled again; nothing else changes.
    """

    def __init__(self) -> None:
        self._floor = 0

    @staticmethod
    def count() -> int:
        return len(jax.devices()[0].client.live_executables())

    def let_go(self) -> None:
        """Where more than MOST_LEFT have gathered since the last time."""
        there = self.count()
        self._floor = min(self._floor, there)
        if there - self._floor > MOST_LEFT:
            jax.clear_caches()
            self._floor = self.count()


COMPILED = Compiled()


def peak(f: Callable[..., Any], *given: Any) -> int:
    """Most bytes that are alive at once in `f(*given)`, beside what it is given, if nothing is fused.

    XLA keeps fewer intermediate values, so this is more than it takes. `given` may be shapes.
    """
    return _peak(jax.make_jaxpr(f)(*given).jaxpr)


def _size(var: Any) -> int:
    shape = getattr(var.aval, "shape", ())
    dtype = getattr(var.aval, "dtype", None)
    try:
        item = np.dtype(dtype).itemsize
    except TypeError:  # a key
        item = 8
    return math.prod(shape) * item


def _peak(jaxpr: Jaxpr) -> int:
    last: dict[Any, int] = {}
    for i, equation in enumerate(jaxpr.eqns):
        last |= {v: i for v in equation.invars if not isinstance(v, Literal)}
    last |= {v: len(jaxpr.eqns) for v in jaxpr.outvars if not isinstance(v, Literal)}
    made, alive, most = set[Any](), 0, 0
    for i, equation in enumerate(jaxpr.eqns):
        inside = max((_peak(inner) for inner in inner(equation.params)), default=0)
        out = sum(_size(v) for v in equation.outvars)
        most = max(most, alive + max(inside, out))
        for v in equation.outvars:
            if v in last:
                made.add(v)
                alive += _size(v)
        for v in {v for v in equation.invars if not isinstance(v, Literal)}:
            if v in made and last[v] == i:
                alive -= _size(v)
    return max(most, alive)
