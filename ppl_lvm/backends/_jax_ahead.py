"""What one part of a step's arguments decides alone, apart from the rest: a loop finds it for all its steps at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Var, jaxpr_as_fun

from ppl_lvm.backends._jax_together import SMALL, Part, array, together


def ahead(
    f: Callable[[Any, Any], Any], early: Any, late: Any, most: int
) -> tuple[Callable[[Any], list[Any]], Callable[[list[Any], Any], Any]]:
    """Two functions `first` and `rest` such that `rest(first(early), late)` is `f(early, late)`.

    As much as can be of what depends on `early` alone is in the first, in arrays of few entries, all together at most
    `most`. Both arguments may be shapes. Few are `SMALL`, and fewer where there are too many arrays.

    A random key makes noise of a few numbers, at the price of as many calls as a step of a small model has in all, and
    a compiler that fuses these into what reads the noise computes it anew for every entry there.

    Example:
        >>> import jax.numpy as jnp
        >>> first, rest = ahead(lambda key, x: jax.random.normal(key) * x, jax.random.key(0), jnp.ones(3), 10)
        >>> [noise.shape for noise in first(jax.random.key(1))]
        [()]
        >>> bool((rest(first(jax.random.key(1)), jnp.ones(3)) == jax.random.normal(jax.random.key(1))).all())
        True
    """
    closed, out = jax.make_jaxpr(f, return_shape=True)(early, late)
    largest = SMALL
    while True:
        first, rest, between = _halves(closed, len(jax.tree.leaves(early)), largest)
        if not largest or sum(map(_size, between)) <= most:
            break
        largest //= 2
    structure = jax.tree.structure(out)
    layout: list[tuple[int, int | None]] = []

    def at_once(*early: Any) -> list[Any]:
        arrays: list[Any] = []
        places: dict[int, int] = {}
        for found in together(first, early):
            held, at = found if isinstance(found, Part) else (found, None)
            if id(held) not in places:
                places[id(held)] = len(arrays)
                arrays.append(held)
            layout.append((places[id(held)], at))
        return arrays

    before = jax.make_jaxpr(at_once)(*jax.tree.leaves(early))

    def later(found: list[Any], late: Any) -> Any:
        given = [found[i] if at is None else Part(found[i], at) for i, at in layout]
        return jax.tree.unflatten(structure, map(array, together(rest, [*given, *jax.tree.leaves(late)])))

    return (lambda early: jaxpr_as_fun(before)(*jax.tree.leaves(early))), later


def _halves(closed: ClosedJaxpr, n: int, largest: int) -> tuple[ClosedJaxpr, ClosedJaxpr, list[Var]]:
    """The computation cut in two, and what passes from the first part, which sees the first n arguments, to the next.

    What depends on nothing is in both, where the compiler leaves out what is not asked for.
    """
    whole = closed.jaxpr
    # An array that is traced may be anything, and is not there where the first part runs on its own.
    fixed = {v for v, c in zip(whole.constvars, closed.consts, strict=True) if not isinstance(c, jax.core.Tracer)}
    early, late = whole.invars[:n], whole.invars[n:]
    known, before, after = set(early), [], []
    for eqn in whole.eqns:
        read = _read(eqn.invars)
        if read <= fixed and not eqn.effects:
            fixed |= set(eqn.outvars)
            before.append(eqn)
            after.append(eqn)
        elif read <= known | fixed and not eqn.effects and all(_size(v) <= largest for v in eqn.outvars):
            known |= set(eqn.outvars)
            before.append(eqn)
        else:
            after.append(eqn)
    asked = _read([*whole.outvars, *(v for eqn in after for v in eqn.invars)])
    between = [v for v in (*early, *(v for eqn in before for v in eqn.outvars)) if v in known and v in asked]
    names = whole.debug_info.with_unknown_names()
    first = whole.replace(invars=early, outvars=between, eqns=before, debug_info=names)
    rest = whole.replace(invars=[*between, *late], eqns=after, debug_info=names)
    return ClosedJaxpr(first, closed.consts), ClosedJaxpr(rest, closed.consts), between


def _read(given: Iterable[Any]) -> set[Var]:
    return {v for v in given if isinstance(v, Var)}


def _size(v: Any) -> int:
    return v.aval.size
