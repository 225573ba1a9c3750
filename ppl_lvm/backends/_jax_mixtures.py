"""Conjugate distributions of `ppl.structured` as NumPyro's."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro.distributions import constraints

from ppl_lvm.structured import mixture

Array = jax.Array

jax.tree_util.register_dataclass(
    mixture.NormalInverseWishart, data_fields=["form", "df"], meta_fields=["validate"]
)
jax.tree_util.register_dataclass(mixture.Gaussian, data_fields=["form"], meta_fields=[])


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


CONJUGATE = (LogDirichlet, NormalInverseWishart, Gaussian)


def namespace() -> dict[str, Any]:
    """See `_jax_structured.namespace`."""
    return {
        "LogDirichlet": LogDirichlet,
        "NormalInverseWishart": NormalInverseWishart,
        "Gaussian": Gaussian,
        "Labels": Labels,
        "niw_form": mixture.niw_form,
        "mixture_posterior": mixture.mixture_posterior,
    }
