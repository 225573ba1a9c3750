"""Structured distributions of `ppl.structured` as NumPyro's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro.distributions import constraints

from ppl_lvm.structured import gaussian_chain as core
from ppl_lvm.structured.scan import Method

Array = jax.Array

jax.tree_util.register_dataclass(
    core.GaussianChain,
    data_fields=["mean", "cov", "transition", "bias", "noise", "precision", "shift"],
    meta_fields=["method", "validate"],
)


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
        front = core.steps_in_front(mean, cov, transition, bias, noise, precision, shift)
        check = dist.Distribution._validate_args if validate_args is None else validate_args
        self._of(core.GaussianChain(**front, method=method, validate=bool(check)), None)

    def _of(self, chain: core.GaussianChain, batch_shape: tuple[int, ...] | None) -> GaussianChain:
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
        found = self.chain.log_prob(jnp.moveaxis(value, -2, 0))
        return jnp.broadcast_to(found, jnp.broadcast_shapes(found.shape, self.batch_shape))

    def noise_of(self, value: Array) -> Array:
        return self.chain.noise_of(jnp.moveaxis(value, -2, 0))

    def from_noise(self, noise: Array) -> Array:
        return jnp.moveaxis(self.chain.sample(noise), 0, -2)

    @property
    def mean(self) -> Array:
        moved = jnp.moveaxis(self.chain.moments().mean, 0, -2)
        return jnp.broadcast_to(moved, (*self.batch_shape, *self.event_shape))

    @property
    def variance(self) -> Array:
        moved = jnp.moveaxis(jnp.diagonal(self.chain.moments().cov, axis1=-2, axis2=-1), 0, -2)
        return jnp.broadcast_to(moved, (*self.batch_shape, *self.event_shape))


def kl(q: GaussianChain, p: GaussianChain) -> Array:
    """`KL(q || p)` in closed form."""
    return jnp.broadcast_to(q.chain.kl(p.chain), jnp.broadcast_shapes(q.batch_shape, p.batch_shape))


def namespace() -> Any:
    """What portable programs find as `ppl.structured`."""
    return SimpleNamespace(GaussianChain=GaussianChain, observed=core.observed)
