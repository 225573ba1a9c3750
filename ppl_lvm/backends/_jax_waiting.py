"""Large stacks of matrices on a CPU, where jaxlib from 0.10 on and before 0.11.2 may wait for itself for ever."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun

from ppl_lvm.backends._jax_equations import inner, run_equation
from ppl_lvm.backends._jax_ops import platform

WORK = 200_000
"""Multiplications from which on jaxlib shares a stack of matrices among its threads."""

OPERATIONS = ("cholesky", "triangular_solve")
"""Those that models are made of. Others (eigenvalues, singular values) wait in the same way, and are left alone."""


def threads() -> int:
    """Threads of jaxlib that may wait for one another; 1 where none does."""
    version = tuple(int(part) for part in jaxlib.__version__.split(".")[:3] if part.isdigit())
    if not (0, 10) <= version < (0, 11, 2) or platform() != "cpu":
        return 1
    given = os.environ.get("NPROC", "")
    if given.isdigit():
        return max(int(given), 1)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def without_waiting(f: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, to be compiled, whose threads do not wait for one another.

    A thread that factors a large stack of matrices hands parts of it to all threads, itself among them, and waits for
    those parts. Where as many stacks are under way at once as there are threads, nobody is left to work, and the
    computation stands still. So large stacks are taken in pieces, each too small to be shared, one after the other.

    Example:
        >>> x = jnp.broadcast_to(jnp.eye(4), (5000, 4, 4))
        >>> bool((jax.jit(without_waiting(jnp.linalg.cholesky))(x) == x).all())
        True
    """

    @wraps(f)
    def in_turn(*arguments: Any) -> Any:
        if threads() == 1:
            return f(*arguments)
        closed, out = jax.make_jaxpr(f, return_shape=True)(*arguments)
        made = jaxpr_as_fun(in_pieces(closed))(*jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(out), made)

    return in_turn


def in_pieces(closed: ClosedJaxpr) -> ClosedJaxpr:
    """A computation with large stacks of matrices in pieces, those in its loops and branches too."""
    if not _anywhere(closed):
        return closed

    def pieces(*arguments: Any) -> list[Any]:
        values: dict[Any, Any] = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
        values |= zip(closed.jaxpr.invars, arguments, strict=True)
        for eqn in closed.jaxpr.eqns:
            seen = list(dict.fromkeys(v for v in eqn.invars if isinstance(v, Var)))
            here = _one_after_the_other if _shared(eqn) else _with_pieces_inside
            values |= zip(eqn.outvars, here(closed, eqn, seen, [values[v] for v in seen]), strict=True)
        return [v.val if isinstance(v, Literal) else values[v] for v in closed.jaxpr.outvars]

    shapes: list[Any] = [v.aval for v in closed.jaxpr.invars]
    return jax.make_jaxpr(pieces)(
        *(jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=getattr(a, "weak_type", False)) for a in shapes)
    )


def _anywhere(closed: ClosedJaxpr) -> bool:
    def within(eqns: Sequence[JaxprEqn]) -> bool:
        return any(_shared(eqn) or any(within(part.eqns) for part in inner(eqn.params)) for eqn in eqns)

    return within(closed.jaxpr.eqns)


def _shared(eqn: JaxprEqn) -> bool:
    return eqn.primitive.name in OPERATIONS and _stack(eqn) > 1 and _stack(eqn) > _piece(eqn)


def _stack(eqn: JaxprEqn) -> int:
    matrices: Any = eqn.invars[0].aval
    return math.prod(matrices.shape[:-2])


def _piece(eqn: JaxprEqn) -> int:
    """How many matrices are too little work to be shared."""
    matrices: Any = eqn.invars[0].aval
    last: Any = eqn.invars[-1].aval
    return max((WORK - 1) // (matrices.shape[-1] * last.shape[-2] * last.shape[-1]), 1)


def _one_after_the_other(closed: ClosedJaxpr, eqn: JaxprEqn, seen: Sequence[Var], values: Sequence[Any]) -> list[Any]:
    n = _stack(eqn)
    parts = -(-n // _piece(eqn))
    size = -(-n // parts)
    made_of: Any = eqn.outvars[0].aval
    stacks = [jnp.reshape(a, (n, *a.shape[-2:])) for a in values]

    def one(matrices: Sequence[Any]) -> Any:
        return eqn.primitive.bind(*(matrices[seen.index(v)] for v in eqn.invars), **eqn.params)

    # Filled up with the first matrices, which are solvable if any is.
    filled = [jnp.concatenate([a, a[: parts * size - n]]).reshape(parts, size, *a.shape[1:]) for a in stacks]
    made = jax.lax.map(one, filled).reshape(parts * size, *made_of.shape[-2:])[:n]
    return [made.reshape(made_of.shape)]


def _with_pieces_inside(closed: ClosedJaxpr, eqn: JaxprEqn, seen: Sequence[Var], values: Sequence[Any]) -> list[Any]:
    def replaced(value: Any) -> Any:
        if type(value) in (tuple, list):  # the branches of a choice; other parameters are tuples with names
            return type(value)(map(replaced, value))
        if isinstance(value, Jaxpr):  # of `jax.checkpoint`, which has no constants
            closed = in_pieces(ClosedJaxpr(value, []))
            assert not closed.consts
            return closed.jaxpr
        return in_pieces(value) if isinstance(value, ClosedJaxpr) else value

    changed = eqn.replace(params={name: replaced(value) for name, value in eqn.params.items()})
    return run_equation(closed, changed, seen, values)
