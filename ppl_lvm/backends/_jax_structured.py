"""Structured distributions of `ppl.structured` as NumPyro's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro.distributions import constraints

from ppl_lvm.structured import gaussian_chain as gaussian
from ppl_lvm.structured import markov_chain as markov
from ppl_lvm.structured.matern import matern
from ppl_lvm.structured.scan import Method

Array = jax.Array

jax.tree_util.register_dataclass(
    gaussian.GaussianChain,
    data_fields=["mean", "cov", "transition", "bias", "noise", "precision", "shift"],
    meta_fields=["method", "validate"],
)
jax.tree_util.register_dataclass(
    markov.MarkovChain, data_fields=["initial", "transition", "node"], meta_fields=["method"]
)


# Outside of a compiled function JAX would compile every operation of a chain by itself.
_sample = jax.jit(lambda chain, noise: chain.sample(noise))
_log_prob = jax.jit(lambda chain, value: chain.log_prob(value))
_moments = jax.jit(lambda chain: chain.moments())
_kl = jax.jit(lambda q, p: q.kl(p))


class GaussianChain(dist.Distribution):
    """See `ppl_lvm.structured.gaussian_chain`; steps are the first axis of events `[T, D]`, behind the batch."""

    arg_constraints: dict[str, Any] = {}
    support = constraints.independent(constraints.real, 2)
    reparametrized_params = ["mean", "cov", "transition", "bias", "noise"]
    pytree_data_fields = ("chain",)

    def __init__(
        self,
        mean: Array,
        cov: Array,
        transition: Array,
        bias: Array,
        noise: Array,
        precision: Array | None = None,
        shift: Array | None = None,
        method: Method = "auto",
        validate_args: bool | None = None,
    ) -> None:
        front = gaussian.steps_in_front(mean, cov, transition, bias, noise, precision, shift)
        check = dist.Distribution._validate_args if validate_args is None else validate_args
        self._of(gaussian.GaussianChain(**front, method=method, validate=bool(check)), None)

    def _of(self, chain: gaussian.GaussianChain, batch_shape: tuple[int, ...] | None) -> GaussianChain:
        self.chain = chain
        shape = chain.batch_shape if batch_shape is None else batch_shape
        super().__init__(shape, (chain.steps, chain.dim), validate_args=False)
        return self

    @property
    def has_rsample(self) -> bool:
        return True

    def expand(self, batch_shape: Any) -> GaussianChain:
        return type(self).__new__(type(self))._of(self.chain, tuple(batch_shape))

    def rsample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        shape = (self.chain.steps, *sample_shape, *self.batch_shape, self.chain.dim)
        return self.from_noise(jax.random.normal(key, shape, dtype=self.chain.mean.dtype))

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        return self.rsample(key, sample_shape)

    def log_prob(self, value: Array) -> Array:
        found = _log_prob(self.chain, jnp.moveaxis(value, -2, 0))
        return jnp.broadcast_to(found, jnp.broadcast_shapes(found.shape, self.batch_shape))

    def noise_of(self, value: Array) -> Array:
        return self.chain.noise_of(jnp.moveaxis(value, -2, 0))

    def from_noise(self, noise: Array) -> Array:
        return jnp.moveaxis(_sample(self.chain, noise), 0, -2)

    @property
    def mean(self) -> Array:
        moved = jnp.moveaxis(_moments(self.chain).mean, 0, -2)
        return jnp.broadcast_to(moved, (*self.batch_shape, *self.event_shape))

    @property
    def variance(self) -> Array:
        moved = jnp.moveaxis(jnp.diagonal(_moments(self.chain).cov, axis1=-2, axis2=-1), 0, -2)
        return jnp.broadcast_to(moved, (*self.batch_shape, *self.event_shape))


class MarkovChain(dist.Distribution):
    """See `ppl_lvm.structured.markov_chain`; events are sequences `[T]` of integers, behind the batch."""

    arg_constraints: dict[str, Any] = {}
    pytree_data_fields = ("chain",)

    def __init__(
        self,
        initial: Array,
        transition: Array,
        node: Array | None = None,
        method: Method = "auto",
        validate_args: bool | None = None,
    ) -> None:
        self._of(markov.MarkovChain(**markov.steps_in_front(initial, transition, node), method=method), None)

    def _of(self, chain: markov.MarkovChain, batch_shape: tuple[int, ...] | None) -> MarkovChain:
        self.chain = chain
        shape = chain.batch_shape if batch_shape is None else batch_shape
        super().__init__(shape, (chain.steps,), validate_args=False)
        return self

    @property
    def support(self) -> Any:
        return constraints.independent(constraints.integer_interval(0, self.chain.values - 1), 1)

    @property
    def has_rsample(self) -> bool:
        return False

    def expand(self, batch_shape: Any) -> MarkovChain:
        return type(self).__new__(type(self))._of(self.chain, tuple(batch_shape))

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        shape = (self.chain.steps, *sample_shape, *self.batch_shape)
        uniform = jax.random.uniform(key, shape, dtype=self.chain.initial.dtype)
        return jnp.moveaxis(_sample(self.chain, uniform), 0, -1)

    def log_prob(self, value: Array) -> Array:
        found = _log_prob(self.chain, jnp.moveaxis(value, -1, 0))
        return jnp.broadcast_to(found, jnp.broadcast_shapes(found.shape, self.batch_shape))


CHAINS = (GaussianChain, MarkovChain)


def kl(q: Any, p: Any) -> Array:
    """`KL(q || p)` of two chains of one kind, in closed form."""
    return jnp.broadcast_to(_kl(q.chain, p.chain), jnp.broadcast_shapes(q.batch_shape, p.batch_shape))


def namespace() -> Any:
    """What portable programs find as `ppl.structured`."""
    chains = {"GaussianChain": GaussianChain, "MarkovChain": MarkovChain}
    return SimpleNamespace(**chains, matern=matern, observed=gaussian.observed)
