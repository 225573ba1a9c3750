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
from ppl_lvm.structured import mixture
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

jax.tree_util.register_dataclass(mixture.Gaussian, data_fields=["form"], meta_fields=[])
jax.tree_util.register_dataclass(
    mixture.NormalInverseWishart, data_fields=["form", "df"], meta_fields=["validate"]
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
        return jnp.moveaxis(self.chain.sample(uniform), 0, -1)

    def log_prob(self, value: Array) -> Array:
        found = self.chain.log_prob(jnp.moveaxis(value, -1, 0))
        return jnp.broadcast_to(found, jnp.broadcast_shapes(found.shape, self.batch_shape))


class _LogSimplex(type(constraints.real_vector)):  # type: ignore[misc]
    """Logs of probabilities."""

    def __call__(self, x: Array) -> Array:
        return jnp.abs(jax.nn.logsumexp(x, -1)) < 1e-5


class _Form(type(constraints.positive_definite)):  # type: ignore[misc]
    """Forms of normals (see `structured.mixture`)."""

    def __call__(self, x: Array) -> Array:
        return jnp.linalg.eigvalsh(x[..., 1:, 1:])[..., 0] > 0


class LogDirichlet(dist.Distribution):
    """Log probabilities `[K]` of a Dirichlet draw; see `structured.mixture.Dirichlet`. Densities are the draw's own."""

    arg_constraints = {"concentration": constraints.independent(constraints.positive, 1)}
    support = _LogSimplex()
    reparametrized_params = ["concentration"]

    def __init__(self, concentration: Array, validate_args: bool | None = None) -> None:
        self.concentration = concentration
        super().__init__(jnp.shape(concentration)[:-1], jnp.shape(concentration)[-1:], validate_args=validate_args)

    @property
    def of(self) -> mixture.Dirichlet:
        return mixture.Dirichlet(self.concentration)

    def rsample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        a = jnp.broadcast_to(self.concentration, (*sample_shape, *self.batch_shape, *self.event_shape))
        key, other = jax.random.split(key)
        uniform = jax.random.uniform(other, a.shape, a.dtype, minval=jnp.finfo(a.dtype).tiny)
        return mixture.Dirichlet(a).sample(jax.random.gamma(key, a + 1.0), uniform)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        return self.rsample(key, sample_shape)

    def log_prob(self, value: Array) -> Array:
        return self.of.log_prob(value)

    @property
    def mean(self) -> Array:
        return self.of.expected()


class NormalInverseWishart(dist.Distribution):
    """Forms `[D + 1, D + 1]` of normals; see `structured.mixture.NormalInverseWishart`.

    Densities are those of mean and covariance.
    """

    arg_constraints: dict[str, Any] = {}
    support = _Form()
    reparametrized_params = ["form", "df"]
    pytree_data_fields = ("of",)

    def __init__(self, form: Array, df: Array, validate_args: bool | None = None) -> None:
        check = dist.Distribution._validate_args if validate_args is None else validate_args
        self._of(mixture.NormalInverseWishart(form, jnp.asarray(df, form.dtype), validate=bool(check)), None)

    def _of(self, of: mixture.NormalInverseWishart, batch_shape: tuple[int, ...] | None) -> NormalInverseWishart:
        self.of = of
        shape = of.batch_shape if batch_shape is None else batch_shape
        super().__init__(shape, tuple(of.form.shape[-2:]), validate_args=False)
        return self

    @property
    def has_rsample(self) -> bool:
        return True

    def expand(self, batch_shape: Any) -> NormalInverseWishart:
        return type(self).__new__(type(self))._of(self.of, tuple(batch_shape))

    def rsample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        shape, D, dtype = (*sample_shape, *self.batch_shape), self.of.dim, self.of.form.dtype
        key, other = jax.random.split(key)
        normal = jax.random.normal(other, (*shape, D + 1, D), dtype)
        return self.of.sample(normal, jax.random.gamma(key, jnp.broadcast_to(self.of.halves, (*shape, D))))

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        return self.rsample(key, sample_shape)

    def log_prob(self, value: Array) -> Array:
        found = self.of.log_prob(value)
        return jnp.broadcast_to(found, jnp.broadcast_shapes(found.shape, self.batch_shape))

    @property
    def mean(self) -> Array:
        return jnp.broadcast_to(self.of.expected(), (*self.batch_shape, *self.event_shape))


class Gaussian(dist.Distribution):
    """`log_prob(z)` is that of a form, of a normal or a multiple of it; draws are normal. See `structured.mixture`."""

    arg_constraints: dict[str, Any] = {}
    support = constraints.real_vector
    reparametrized_params = ["form"]
    pytree_data_fields = ("of",)

    def __init__(self, form: Array, validate_args: bool | None = None) -> None:
        self._of(mixture.Gaussian(form), tuple(form.shape[:-2]))

    def _of(self, of: mixture.Gaussian, batch_shape: tuple[int, ...]) -> Gaussian:
        self.of = of
        super().__init__(batch_shape, (of.dim,), validate_args=False)
        return self

    @property
    def has_rsample(self) -> bool:
        return True

    def expand(self, batch_shape: Any) -> Gaussian:
        return type(self).__new__(type(self))._of(self.of, tuple(batch_shape))

    def rsample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        shape = (*sample_shape, *self.batch_shape, self.of.dim)
        return self.of.sample(jax.random.normal(key, shape, self.of.form.dtype))

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        return self.rsample(key, sample_shape)

    def log_prob(self, value: Array) -> Array:
        found = self.of.log_prob(value)
        return jnp.broadcast_to(found, jnp.broadcast_shapes(found.shape, self.batch_shape))

    def noise_of(self, value: Array) -> Array:
        return self.of.noise_of(value)

    def from_noise(self, noise: Array) -> Array:
        return self.of.sample(noise)

    @property
    def mean(self) -> Array:
        return jnp.broadcast_to(self.of.moments()[0], (*self.batch_shape, *self.event_shape))

    @property
    def variance(self) -> Array:
        variance = jnp.diagonal(self.of.moments()[1], axis1=-2, axis2=-1)
        return jnp.broadcast_to(variance, (*self.batch_shape, *self.event_shape))


class Labels(dist.CategoricalLogits):
    """Integers whose `log_prob` is `log_weight[value]` as it is, linear in `log_weight` `[..., K]`, normalised or not.

    Draws are from the normalised weights. The guide of a site takes a Categorical, whose density is one.
    """

    def __init__(self, log_weight: Array, validate_args: bool | None = None) -> None:
        super().__init__(log_weight, validate_args=validate_args)

    def log_prob(self, value: Array) -> Array:
        # Labels among data may come as floats.
        return super().log_prob(jnp.asarray(value, int)) + jax.nn.logsumexp(self.logits, -1)


CHAINS = (GaussianChain, MarkovChain)
CONJUGATE = (LogDirichlet, NormalInverseWishart, Gaussian)


def kl(q: Any, p: Any) -> Array:
    """`KL(q || p)` of two of one kind, in closed form."""
    found = q.chain.kl(p.chain) if isinstance(q, CHAINS) else q.of.kl(p.of)
    return jnp.broadcast_to(found, jnp.broadcast_shapes(q.batch_shape, p.batch_shape))


def namespace() -> Any:
    """What portable programs find as `ppl.structured`."""
    return SimpleNamespace(
        GaussianChain=GaussianChain,
        MarkovChain=MarkovChain,
        observed=gaussian.observed,
        LogDirichlet=LogDirichlet,
        NormalInverseWishart=NormalInverseWishart,
        Gaussian=Gaussian,
        Labels=Labels,
        niw_form=mixture.niw_form,
        mixture_posterior=mixture.mixture_posterior,
    )
