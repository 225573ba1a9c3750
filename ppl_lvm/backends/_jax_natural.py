"""Natural-gradient steps on NumPyro; see `natural`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppl_lvm.backends import _jax_dists
from ppl_lvm.backends.natural import Factor, Slopes, factors, scaled, solved
from ppl_lvm.backends.training import Unit

Array = jax.Array
Params = Mapping[str, Any]

_ONCE = {"xla_backend_optimization_level": 0}
"""Of what is called once or twice: compiling it well would take longer than running it."""


def _total(bound: Any, batch: Any, sites: Sequence[str], params: Params, moved: Params) -> dict[str, Array]:
    """`KL(q_params || q_moved)` of sites, elements apart."""
    one, other = bound.guide_distributions(params, batch, sites), bound.guide_distributions(moved, batch, sites)
    return {s: _jax_dists.kl(one[s], other[s]) for s in sites}


class _Divergences:
    def __init__(self, bound: Any, batch: Any) -> None:
        self._bound, self._batch, self._u = bound, batch, bound.initial
        rng = np.random.default_rng(0)
        arrays = {n: v for n, v in self._u.items() if jax.tree_util.all_leaves([v])}
        self._near = {n: v + 0.1 * rng.normal(size=v.shape).astype(v.dtype) for n, v in arrays.items()}

        def slopes(near: Params, weights: Mapping[str, Array]) -> dict[str, Params]:
            def weighed(near: Params, site: str) -> Array:
                return (_total(bound, batch, [site], self._u, {**self._u, **near})[site] * weights[site]).sum()

            return {site: jax.grad(weighed)(near, site) for site in weights}

        self._slopes = jax.jit(slopes, compiler_options=_ONCE)

    def shapes(self, sites: Sequence[str]) -> Mapping[str, tuple[int, ...]]:
        found = {}
        for site in sites:
            try:
                kl = jax.eval_shape(lambda site=site: _total(self._bound, self._batch, [site], self._u, self._u))
            except NotImplementedError:
                continue
            found[site] = tuple(kl[site].shape)
        return found

    def slopes(self, weights: Mapping[str, np.ndarray]) -> Slopes:
        return jax.tree.map(np.asarray, self._slopes(self._near, dict(weights)))

    def fishers(self, factors: Sequence[Factor]) -> Sequence[np.ndarray]:
        def every(u: Params) -> list[Array]:
            return [_fisher(self._bound, self._batch, f, u) for f in factors]

        return [np.asarray(F) for F in jax.jit(every, compiler_options=_ONCE)(self._u)]


def found(bound: Any, batch: Any, units: Mapping[str, Unit]) -> dict[str, tuple[Factor, ...]]:
    """The factors of units with natural steps, or LegalityError."""
    natural = {unit: u for unit, u in units.items() if u.natural}
    return factors(natural, bound.structure, _Divergences(bound, batch), bound.initial) if natural else {}


def _fisher(bound: Any, batch: Any, factor: Factor, params: Params) -> Array:
    at = factor.flat(params)

    def total(flat: Array) -> Array:
        kl = _total(bound, batch, factor.sites, params, {**params, **factor.parts(flat, params)})
        return jnp.stack([x.sum() for x in kl.values()]).sum()

    def row(unit: Array) -> Array:
        return jax.jvp(jax.grad(total), (at,), (jnp.broadcast_to(unit, at.shape),))[1]

    return jnp.moveaxis(jax.vmap(row)(jnp.eye(at.shape[1], dtype=at.dtype)), 0, 1)


def displaced(
    bound: Any, batch: Any, chosen: tuple[Factor, ...], params: Params, gradient: Params, rate: Any
) -> dict[str, Array]:
    """What a step takes off the unconstrained parameters."""
    found: dict[str, Array] = {}
    for factor in chosen:
        u = {n: params[n] for n in factor.names}
        F, D = scaled(_fisher(bound, batch, factor, params))
        x = factor.parts(solved(jnp.linalg.cholesky(F), D, factor.flat(gradient)), u)
        ahead = {n: v - rate * x[n] for n, v in u.items()}
        straight, mask = {}, jnp.ones(factor.n, bool)
        for n, v in u.items():
            transform, constraint = bound.chart(n)
            c, tangent = jax.jvp(transform, (v,), (x[n],))
            straight[n] = c, c - rate * tangent
            mask &= _inside(constraint, straight[n][1]).reshape(factor.n, -1).all(1)
        for n, v in u.items():
            transform, _ = bound.chart(n)
            where = partial(factor.over, mask)
            c, target = straight[n]
            back = transform._inverse(jnp.where(where(c), target, c))
            found[n] = v - jnp.where(where(v), back.reshape(v.shape), ahead[n])
    return found


def _inside(constraint: Any, value: Array) -> Array:
    if type(constraint).__name__ == "_PositiveDefinite":
        # Symmetric as it is made; factors that do not exist are not finite.
        return jnp.isfinite(jnp.linalg.cholesky(value)).all((-2, -1))
    return jnp.asarray(constraint(value))
