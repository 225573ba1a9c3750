"""Equal operations on small arrays, made as one operation on all of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var

from ppl_lvm.backends._jax_equations import run_equation

SMALL = 64
"""Entries of an array up to which the time is in the number of operations, not in the entries."""

ENOUGH = 16
"""Operations that are made as one: to stack the arrays of fewer, and to take them apart again, costs a step more."""


class Part(NamedTuple):
    """One of several arrays of one shape."""

    whole: jax.Array
    at: int


Found = jax.Array | Part


def together(closed: ClosedJaxpr, arguments: Sequence[Found]) -> list[Found]:
    """What a computation gives, with equal operations that do not wait for one another made as one under `vmap`.

    A program of a hundred sites is a hundred times the operations of one, and a compiler's time is in their number.
    Operations are taken together where there are `ENOUGH`, and all they look at and make has at most `SMALL` entries.

    Example:
        >>> def f(keys, x):
        ...     return [jax.random.normal(keys[i]) * x[i] for i in range(ENOUGH)]
        >>> arguments = jax.random.split(jax.random.key(0), ENOUGH), jnp.arange(float(ENOUGH))
        >>> closed = jax.make_jaxpr(f)(*arguments)
        >>> g = lambda *arguments: [array(a) for a in together(closed, arguments)]
        >>> g(*arguments) == f(*arguments)
        True
        >>> [sum(e.primitive.name == "mul" for e in jax.make_jaxpr(h)(*arguments).eqns) for h in (f, g)]
        [16, 1]
    """
    values: dict[Any, Found] = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    values |= dict(zip(closed.jaxpr.invars, arguments, strict=True))
    for eqns in _equal(closed):
        if len(eqns) == 1:
            (eqn,) = eqns
            seen = list(dict.fromkeys(v for v in eqn.invars if isinstance(v, Var)))
            made = run_equation(closed, eqn, seen, [array(values[v]) for v in seen])
            values |= zip(eqn.outvars, made, strict=True)
            continue
        stacked = [_stacked(of_all, values) for of_all in zip(*(eqn.invars for eqn in eqns), strict=True)]
        given, eqn = _of_own(eqns[0])
        one = partial(run_equation, closed, eqn, given)
        if all(axis is None for _, axis in stacked):
            made = one([a for a, _ in stacked])
            for eqn in eqns:
                values |= zip(eqn.outvars, made, strict=True)
            continue
        made = jax.vmap(one, ([axis for _, axis in stacked],), axis_size=len(eqns))([a for a, _ in stacked])
        for i, eqn in enumerate(eqns):
            values |= {v: Part(a, i) for v, a in zip(eqn.outvars, made, strict=True)}
    return [v.val if isinstance(v, Literal) else values[v] for v in closed.jaxpr.outvars]


def array(found: Found) -> jax.Array:
    """One array on its own."""
    return jax.lax.index_in_dim(found.whole, found.at, keepdims=False) if isinstance(found, Part) else found


def _equal(closed: ClosedJaxpr) -> Iterator[list[JaxprEqn]]:
    """The equations that are asked for, in an order in which each can be found: many equal ones of one depth together,
    the others on their own.
    """
    asked = {v for v in closed.jaxpr.outvars if isinstance(v, Var)}
    kept = []
    for eqn in reversed(closed.jaxpr.eqns):
        if eqn.effects or not asked.isdisjoint(eqn.outvars):
            asked |= {v for v in eqn.invars if isinstance(v, Var)}
            kept.append(eqn)
    depths: defaultdict[Any, int] = defaultdict(int)
    levels: defaultdict[int, dict[Any, list[JaxprEqn]]] = defaultdict(dict)
    turn = 0
    for eqn in reversed(kept):
        depth = max((depths[v] for v in eqn.invars if isinstance(v, Var)), default=0)
        if eqn.effects:  # one after the other, as they are written
            depth = turn = max(depth, turn)
            turn += 1
        depths |= dict.fromkeys(eqn.outvars, depth + 1)
        levels[depth].setdefault(_kind(eqn), []).append(eqn)
    for depth in sorted(levels):
        for eqns in levels[depth].values():
            if len(eqns) >= ENOUGH:
                yield eqns
            else:
                yield from ([eqn] for eqn in eqns)


def _kind(eqn: JaxprEqn) -> Any:
    """What is the same of equations that can be one; of itself alone where there are none."""
    avals: list[Any] = [v.aval for v in (*eqn.invars, *eqn.outvars)]
    if eqn.effects or any(getattr(a, "size", SMALL + 1) > SMALL for a in avals):
        return id(eqn)
    kind = eqn.primitive, tuple(eqn.params.items()), tuple((a.shape, a.dtype) for a in avals)
    try:
        hash(kind)
    except TypeError:  # a list among the parameters
        return id(eqn)
    return kind


def _of_own(eqn: JaxprEqn) -> tuple[Sequence[Var], JaxprEqn]:
    """The equation with a variable for all it looks at, numbers too."""
    avals: list[Any] = [v.aval for v in eqn.invars]
    given = jax.make_jaxpr(lambda *a: a)(*(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals)).jaxpr.invars
    return given, eqn.replace(invars=given)


def _number(literal: Any) -> np.ndarray:
    return np.asarray(literal.val, literal.aval.dtype)


def _stacked(these: Sequence[Any], values: dict[Any, Found]) -> tuple[Any, int | None]:
    """Arrays one behind the other and their axis, which is none where they are all one."""
    if all(isinstance(v, Literal) for v in these):
        numbers = [_number(v) for v in these]
        return (numbers[0], None) if all(np.array_equal(a, numbers[0]) for a in numbers) else (np.stack(numbers), 0)
    found: list[Any] = [_number(v) if isinstance(v, Literal) else values[v] for v in these]
    first = found[0]
    if all(a is first for a in found):
        return array(first), None
    if isinstance(first, Part) and all(isinstance(a, Part) and a.whole is first.whole for a in found):
        at = np.array([a.at for a in found])
        return (first.whole if np.array_equal(at, np.arange(len(first.whole))) else first.whole[at]), 0
    return jnp.stack([array(a) for a in found]), 0
