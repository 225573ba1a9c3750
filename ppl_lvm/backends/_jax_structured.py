"""Structured distributions of `ppl.structured` as NumPyro's."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro.distributions import constraints

from ppl_lvm import ops
from ppl_lvm.backends import _jax_mixtures
from ppl_lvm.backends._jax_waiting import without_waiting
from ppl_lvm.structured import gaussian_chain as gaussian
from ppl_lvm.structured import markov_chain as markov
from ppl_lvm.structured import slds, tucker
from ppl_lvm.structured import tree as trees
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
jax.tree_util.register_dataclass(trees.Tree, data_fields=["root", "edge", "node"], meta_fields=["parents"])
jax.tree_util.register_dataclass(
    slds.SwitchingChain,
    data_fields=["states", "mean", "cov", "transition", "bias", "noise"],
    meta_fields=["method", "validate"],
)


# Outside of a compiled function JAX would compile every operation of a chain by itself.
_sample = jax.jit(without_waiting(lambda chain, noise: chain.sample(noise)))
_log_prob = jax.jit(without_waiting(lambda chain, value: chain.log_prob(value)))
_moments = jax.jit(without_waiting(lambda chain: chain.moments()))
_kl = jax.jit(without_waiting(lambda q, p: q.kl(p)))


class _Structured(dist.Distribution):
    """An algorithm of `ppl_lvm.structured` as a distribution: its steps (nodes) in front are behind the batch here."""

    arg_constraints: dict[str, Any] = {}
    pytree_data_fields = ("chain",)
    chain: Any

    @classmethod
    def of(cls, chain: Any, batch_shape: Any = None) -> Any:
        """With this algorithm, and its batch unless another is given."""
        self = cls.__new__(cls)
        self._of(chain, batch_shape)
        return self

    def _of(self, chain: Any, batch_shape: Any = None) -> None:
        self.chain = chain
        shape = chain.batch_shape if batch_shape is None else batch_shape
        super().__init__(tuple(shape), chain.event_shape, validate_args=False)

    @property
    def has_rsample(self) -> bool:
        return False

    def expand(self, batch_shape: Any) -> Any:
        return type(self).of(self.chain, batch_shape)

    def log_prob(self, value: Array) -> Array:
        found = _log_prob(self.chain, jnp.moveaxis(value, -len(self.event_shape), 0))
        return jnp.broadcast_to(found, jnp.broadcast_shapes(found.shape, self.batch_shape))


class _States(_Structured):
    """Events are integers, drawn from a uniform each."""

    like: str
    """The algorithm's argument whose dtype is that of the uniforms."""

    @property
    def support(self) -> Any:
        return constraints.independent(constraints.integer_interval(0, self.chain.values - 1), 1)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        shape = (*self.event_shape, *sample_shape, *self.batch_shape)
        uniform = jax.random.uniform(key, shape, dtype=getattr(self.chain, self.like).dtype)
        return jnp.moveaxis(_sample(self.chain, uniform), 0, -1)


class GaussianChain(_Structured):
    """See `ppl_lvm.structured.gaussian_chain`; steps are the first axis of events `[T, D]`, behind the batch."""

    support = constraints.independent(constraints.real, 2)
    reparametrized_params = ["mean", "cov", "transition", "bias", "noise"]

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
        self._of(gaussian.GaussianChain(**front, method=method, validate=bool(check)))

    @property
    def has_rsample(self) -> bool:
        return True

    def rsample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        shape = (self.chain.steps, *sample_shape, *self.batch_shape, self.chain.dim)
        return self.from_noise(jax.random.normal(key, shape, dtype=self.chain.mean.dtype))

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        return self.rsample(key, sample_shape)

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


class MarkovChain(_States):
    """See `ppl_lvm.structured.markov_chain`; events are sequences `[T]` of integers, behind the batch."""

    like = "initial"

    def __init__(
        self,
        initial: Array,
        transition: Array,
        node: Array | None = None,
        method: Method = "auto",
        validate_args: bool | None = None,
    ) -> None:
        self._of(markov.MarkovChain(**markov.steps_in_front(initial, transition, node), method=method))


class SwitchingChain(_Structured):
    """See `ppl_lvm.structured.slds`; events are the numbers z `[T, D]`, the states summed out of their density.

    `initial [..., V]` and `move [..., T - 1, V, V]` are the states' logs. `states` is their distribution,
    `given(s)` that of z given them.
    """

    support = constraints.independent(constraints.real, 2)

    def __init__(
        self,
        initial: Array,
        move: Array,
        mean: Array,
        cov: Array,
        transition: Array,
        bias: Array,
        noise: Array,
        method: Method = "auto",
        validate_args: bool | None = None,
    ) -> None:
        states, front = slds.steps_in_front(initial, move, mean, cov, transition, bias, noise, method)
        check = dist.Distribution._validate_args if validate_args is None else validate_args
        self._of(slds.SwitchingChain(states, **front, method=method, validate=bool(check)))

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        of_states, of_z = jax.random.split(key)
        dtype, shape = self.chain.mean.dtype, (self.chain.steps, *sample_shape, *self.batch_shape)
        noise = jax.random.normal(of_z, (*shape, self.chain.dim), dtype=dtype)
        return jnp.moveaxis(self.chain.sample(jax.random.uniform(of_states, shape, dtype=dtype), noise)[1], 0, -2)

    @property
    def states(self) -> MarkovChain:
        return MarkovChain.of(self.chain.states)

    def given(self, s: Array) -> GaussianChain:
        return GaussianChain.of(self.chain.given(jnp.moveaxis(s, -1, 0)))

    def mean_field(self, precision: Array, shift: Array, sweeps: int = 10) -> Any:
        """The distributions of the states and of z, and the bound after every sweep, `[..., sweeps]`."""
        q = self.chain.mean_field(jnp.moveaxis(precision, -3, 0), jnp.moveaxis(shift, -2, 0), sweeps)
        return SimpleNamespace(
            states=MarkovChain.of(q.states),
            chain=GaussianChain.of(q.chain),
            bounds=jnp.moveaxis(q.bounds, 0, -1),
        )


class Tree(_States):
    """See `ppl_lvm.structured.tree`; events are the integers `[N]` of all nodes, behind the batch."""

    like = "root"

    def __init__(
        self,
        parents: Sequence[int],
        root: Array,
        edge: Array,
        node: Array | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self._of(trees.Tree(tuple(parents), **trees.nodes_in_front(root, edge, node)))


class _Weights(type(constraints.simplex)):  # type: ignore[misc]
    """Weights `[T, V]` from 0 to 1, at every step one above 0."""

    event_dim = 2
    needs = markov.EVIDENCE

    def __call__(self, x: Array) -> Array:
        return jnp.all((x >= 0) & (x <= 1), axis=(-2, -1)) & jnp.all(jnp.any(x > 0, axis=-1), axis=-1)

    def feasible_like(self, prototype: Array) -> Array:
        return jnp.ones_like(prototype)


class VirtualEvidence(dist.Distribution):
    """Weights `[T, V]` of what is known of states z `[..., T]`: `log_prob(weight) = sum_t log weight_t(z_t)`.

    A likelihood, which is a density of weights only where they are labels (one-hot); those are what it draws.
    """

    arg_constraints: dict[str, Any] = {}
    support = _Weights()
    pytree_data_fields = ("z",)
    pytree_aux_fields = ("values",)

    def __init__(self, z: Array, values: int, validate_args: bool | None = None) -> None:
        self.z, self.values = z, values
        super().__init__(z.shape[:-1], (z.shape[-1], values), validate_args=False)

    def expand(self, batch_shape: Any) -> VirtualEvidence:
        return VirtualEvidence(jnp.broadcast_to(self.z, (*batch_shape, self.z.shape[-1])), self.values)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        shape = (*sample_shape, *self.batch_shape, *self.event_shape)
        return jnp.broadcast_to(ops.one_hot(self.z, self.values), shape)

    def log_prob(self, value: Array) -> Array:
        return markov.log_evidence(value, self.z)


CHAINS = (GaussianChain, MarkovChain, Tree)
CLOSED = (*CHAINS, *_jax_mixtures.CONJUGATE)


def kl(q: Any, p: Any) -> Array:
    """`KL(q || p)` of two of one kind of `CLOSED`."""
    found = _kl(q.chain, p.chain) if isinstance(q, CHAINS) else q.of.kl(p.of)
    return jnp.broadcast_to(found, jnp.broadcast_shapes(q.batch_shape, p.batch_shape))


def namespace() -> Any:
    """What portable programs find as `ppl.structured`."""
    return SimpleNamespace(
        GaussianChain=GaussianChain,
        MarkovChain=MarkovChain,
        SwitchingChain=SwitchingChain,
        Tree=Tree,
        VirtualEvidence=VirtualEvidence,
        at=tucker.at,
        matern=matern,
        observed=gaussian.observed,
        **_jax_mixtures.namespace(),
    )
