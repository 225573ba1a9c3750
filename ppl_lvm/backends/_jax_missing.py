"""Sites that miss entries, on NumPyro."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist

from ppl_lvm.backends._jax_dists import OneHotCategorical
from ppl_lvm.backends._missing import Missing

Array = jax.Array
OneHot = type(OneHotCategorical.support)
_WRAPPED = (dist.Independent, dist.MaskedDistribution, dist.ExpandedDistribution)


class JaxMissing(Missing):
    """See `_missing.Missing`."""

    def joint(self, fn: Any) -> int:
        while isinstance(fn, _WRAPPED):
            fn = fn.base_dist
        return fn.event_dim

    def apart(self, fn: Any, known: Array) -> Any:
        if not fn.event_dim:
            return fn.mask(known)
        if isinstance(fn, dist.Independent):
            return dist.Independent(self.apart(fn.base_dist, known), fn.reinterpreted_batch_ndims)
        if isinstance(fn, dist.MaskedDistribution):
            return self.apart(fn.base_dist, known).mask(fn._mask)
        if isinstance(fn, dist.ExpandedDistribution) and isinstance(fn.base_dist, dist.Independent):
            return self.apart(fn.base_dist.expand(fn.batch_shape), known)
        return fn.mask(known.all(tuple(range(-fn.event_dim, 0))))

    def merge(self, known: Array, value: Array, other: Array) -> Array:
        return jnp.where(known, jnp.asarray(value, other.dtype), other)

    def neutral(self, fn: Any, value: Array) -> Array:
        return feasible(fn.support, value)


def feasible(support: Any, value: Array) -> Array:
    """Values inside a support, zeros where it names none."""
    try:
        found = support.feasible_like(value)
    except NotImplementedError:
        found = jnp.zeros_like(value)
    if isinstance(support, OneHot):
        # Derived from the simplex, whose feasible value is its centre.
        found = jax.nn.one_hot(jnp.zeros(value.shape[:-1], int), value.shape[-1])
    return jax.lax.stop_gradient(jnp.broadcast_to(found, value.shape).astype(value.dtype))
