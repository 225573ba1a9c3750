"""Distributions that latent-variable models need and NumPyro lacks, under Pyro's names."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro.distributions import constraints
from numpyro.distributions.util import validate_sample

Array = jax.Array


class _OneHot(type(constraints.simplex)):  # type: ignore[misc]
    """One entry is one, the others zero."""

    is_discrete = True

    def __call__(self, x: Array) -> Array:
        return ((x == 0) | (x == 1)).all(-1) & (x.sum(-1) == 1)


class OneHotCategorical(dist.Distribution):
    """One-hot vectors `[..., C]` of a categorical; `log_prob = sum(value * log_softmax(logits))`.

    The density is linear in the value, so relaxed values and straight-through estimators keep their gradient.

    Example:
        >>> OneHotCategorical(logits=jnp.zeros(3)).log_prob(jnp.array([1.0, 0.0, 0.0])).shape
        ()
    """

    arg_constraints = {"logits": constraints.real_vector}
    support = _OneHot()
    has_enumerate_support = True

    def __init__(
        self,
        probs: Array | None = None,
        logits: Array | None = None,
        *,
        validate_args: bool | None = None,
    ) -> None:
        if (probs is None) == (logits is None):
            raise ValueError("OneHotCategorical needs one of probs and logits.")
        self.logits = jax.nn.log_softmax(jnp.log(jnp.asarray(probs)) if logits is None else jnp.asarray(logits), -1)
        super().__init__(self.logits.shape[:-1], self.logits.shape[-1:], validate_args=validate_args)

    @property
    def probs(self) -> Array:
        return jnp.exp(self.logits)

    @property
    def mean(self) -> Array:
        return self.probs

    @property
    def variance(self) -> Array:
        return self.probs * (1.0 - self.probs)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        index = jax.random.categorical(key, self.logits, shape=sample_shape + self.batch_shape)
        return jax.nn.one_hot(index, self.event_shape[0], dtype=self.logits.dtype)

    @validate_sample
    def log_prob(self, value: Array) -> Array:
        return (value * self.logits).sum(-1)

    def enumerate_support(self, expand: bool = True) -> Array:
        values = jnp.eye(self.event_shape[0], dtype=self.logits.dtype)
        values = values.reshape((-1, *(1,) * len(self.batch_shape), self.event_shape[0]))
        return jnp.broadcast_to(values, (len(values), *self.batch_shape, *self.event_shape)) if expand else values


def namespace() -> Any:
    """`numpyro.distributions` with what it lacks."""
    return SimpleNamespace(**{**vars(dist), "OneHotCategorical": OneHotCategorical})
