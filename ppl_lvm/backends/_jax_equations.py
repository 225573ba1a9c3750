"""Equations of a traced computation: what is inside of one, and one run by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var, jaxpr_as_fun


def inner(params: dict[str, Any]) -> list[Jaxpr]:
    """Computations inside an operation: branches, bodies of loops, functions of their own."""
    found: list[Jaxpr] = []
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, ClosedJaxpr):
                found.append(part.jaxpr)
            elif isinstance(part, Jaxpr):
                found.append(part)
    return found


def run_equation(closed: ClosedJaxpr, eqn: JaxprEqn, given: Sequence[Var], values: Sequence[Any]) -> list[jax.Array]:
    """What one equation makes of the values of variables."""
    names = closed.jaxpr.debug_info.with_unknown_names()
    one = closed.jaxpr.replace(
        constvars=[], invars=list(given), outvars=eqn.outvars, eqns=[eqn], effects=eqn.effects, debug_info=names
    )
    return jaxpr_as_fun(ClosedJaxpr(one, []))(*values)
