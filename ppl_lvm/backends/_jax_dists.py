"""Distributions of NumPyro as the engine needs them: those it lacks, supports, closed-form KL, a site's draw."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro.distributions import constraints
from numpyro.distributions.kl import kl_divergence
from numpyro.distributions.util import validate_sample

from ppl_lvm.backends import _jax_mixtures, _jax_structured
from ppl_lvm.backends.sites import Chain, Fresh, is_fresh, is_point, log_values, product_support, rebuild
from ppl_lvm.backends.structure import check_injected, noise_name

Array = jax.Array
Message = dict[str, Any]
HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)
Density = Callable[[Array, Array], Array]
"""`(log probabilities, weights) -> log density` of elements with classes, `[..., V], [..., V] -> [...]`."""


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


class RelaxedOneHotCategorical(dist.Distribution):
    """Weights `y = softmax((logits + G) / temperature)` with Gumbel noise G, `[..., C]`, inside the simplex.

    Example:
        >>> RelaxedOneHotCategorical(0.5, logits=jnp.zeros(3)).log_prob(jnp.array([0.2, 0.3, 0.5])).shape
        ()
    """

    arg_constraints = {"temperature": constraints.positive, "logits": constraints.real_vector}
    reparametrized_params = ["temperature", "logits"]
    support = constraints.simplex

    def __init__(
        self,
        temperature: Array | float,
        probs: Array | None = None,
        logits: Array | None = None,
        *,
        validate_args: bool | None = None,
    ) -> None:
        if (probs is None) == (logits is None):
            raise ValueError("RelaxedOneHotCategorical needs one of probs and logits.")
        self.temperature = jnp.asarray(temperature)
        self.logits = jax.nn.log_softmax(jnp.log(jnp.asarray(probs)) if logits is None else jnp.asarray(logits), -1)
        batch = jnp.broadcast_shapes(self.temperature.shape, self.logits.shape[:-1])
        super().__init__(batch, self.logits.shape[-1:], validate_args=validate_args)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        noise = jax.random.gumbel(key, sample_shape + self.batch_shape + self.event_shape, self.logits.dtype)
        return jax.nn.softmax((self.logits + noise) / self.temperature[..., None], -1)

    @validate_sample
    def log_prob(self, value: Array) -> Array:
        tau, log_y, C = self.temperature, jnp.log(value), self.event_shape[0]
        own = (self.logits - (tau[..., None] + 1.0) * log_y).sum(-1)
        norm = jax.nn.logsumexp(self.logits - tau[..., None] * log_y, -1)
        return jax.lax.lgamma(float(C)) + (C - 1) * jnp.log(tau) + own - C * norm


class MixtureSameFamily(dist.MixtureSameFamily):
    """NumPyro's, where components of independent elements (`to_event`) need no NumPyro 0.22.

    NumPyro 0.21 asks their support itself to be free of parameters, where that of the elements decides. It is shown
    scalars of the same batch instead, and refuses all else that it refuses.

    Example:
        >>> parts = dist.Normal(jnp.zeros((3, 2)), 1.0).to_event(1)
        >>> MixtureSameFamily(dist.Categorical(probs=jnp.ones(3) / 3), parts).event_shape
        (2,)
    """

    def __init__(
        self, mixing_distribution: Any, component_distribution: Any, *, validate_args: bool | None = None
    ) -> None:
        support = component_distribution.support
        while isinstance(support, constraints.independent):
            support = support.base_constraint
        free = isinstance(support, constraints.ParameterFreeConstraint)
        scalars = dist.Normal(jnp.zeros(component_distribution.batch_shape), 1.0)
        super().__init__(mixing_distribution, scalars if free else component_distribution, validate_args=validate_args)
        self._component_distribution = component_distribution
        self._event_shape = component_distribution.event_shape


def namespace() -> Any:
    """`numpyro.distributions` with what it lacks."""
    own = {kind.__name__: kind for kind in (MixtureSameFamily, OneHotCategorical, RelaxedOneHotCategorical)}
    return SimpleNamespace(**{**vars(dist), **own})


def _strip(fn: Any) -> Any:
    while isinstance(fn, (dist.ExpandedDistribution, dist.MaskedDistribution)):
        fn = fn.base_dist
    return fn


def _boolean(fn: Any) -> bool:
    support = fn.support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support is constraints.boolean


def draw(fn: Any, key: Array, as_float: bool) -> Array:
    """A draw; zeros and ones are floats in portable programs, as Pyro has them, and integers in native ones."""
    value = fn.sample(key)
    return value.astype(jnp.zeros(()).dtype) if as_float and _boolean(fn) else value


def fresh(fn: Any, key: Array, shape: tuple[int, ...] = ()) -> tuple[Array, Array] | None:
    """`fn.sample(key, shape)` and its log density, written in the standard normal noise behind the draw.

    For `z = T(e; fn)` that is `log N(e) - log |det dT/de|`, which needs no way back from z to e; it has the gradient
    of `fn.log_prob(z)` where z carries its own. None of a distribution that is not known as such a T.
    """
    if type(fn) is dist.Normal:
        noise = jax.random.normal(key, shape + fn.batch_shape)
        return fn.loc + noise * fn.scale, -0.5 * noise**2 - (jnp.log(fn.scale) + HALF_LOG_2PI)
    if type(fn) is dist.MultivariateNormal:
        noise = jax.random.normal(key, shape + fn.batch_shape + fn.event_shape)
        value = fn.loc + jnp.squeeze(jnp.matmul(fn.scale_tril, noise[..., None]), axis=-1)
        log_det = jnp.log(jnp.diagonal(fn.scale_tril, axis1=-2, axis2=-1)).sum(-1)
        return value, -0.5 * (noise**2).sum(-1) - (log_det + fn.event_shape[0] * HALF_LOG_2PI)
    if type(fn) is dist.ExpandedDistribution and not fn._interstitial_sizes:
        lead = len(fn.batch_shape) - len(fn.base_dist.batch_shape)
        return fresh(fn.base_dist, key, shape + fn.batch_shape[:lead])
    inner = fresh(fn.base_dist, key, shape) if type(fn) is dist.Independent or _transformed(fn) else None
    if inner is None:
        return None
    value, log_q = inner
    if type(fn) is dist.Independent:
        return value, _summed(log_q, fn.reinterpreted_batch_ndims)
    event_dim = fn.base_dist.event_dim
    for transform in fn.transforms:
        before, (value, found) = value, transform.call_with_intermediates(value)
        event_dim -= transform.domain.event_dim
        log_q -= _summed(transform.log_abs_det_jacobian(before, value, found), event_dim)
        event_dim += transform.codomain.event_dim
    return value, log_q


def _transformed(fn: Any) -> bool:
    """Whether a distribution is another's draws, transformed, and nothing else."""
    kind, general = type(fn), dist.TransformedDistribution
    return isinstance(fn, general) and kind.sample is general.sample and kind.log_prob is general.log_prob


def _summed(x: Array, n: int) -> Array:
    """The sum over the last n axes."""
    return x.sum(tuple(range(-n, 0))) if n else x


_NOISE = 0x7015E
"""What sets the key of an estimator's noise apart from those of draws."""

_CLASSES = (
    OneHotCategorical,
    *(dist.CategoricalProbs, dist.CategoricalLogits),
    *(dist.BernoulliProbs, dist.BernoulliLogits),
)


def _of_classes(fn: Any) -> Any:
    """The one-hot, categorical or Bernoulli distribution inside `to_event`, masks and expansions; None if it is none.
    """
    fn = fn.of if isinstance(fn, Chain) else fn
    while isinstance(fn, (dist.Independent, dist.ExpandedDistribution, dist.MaskedDistribution)):
        fn = fn.base_dist
    return fn if isinstance(fn, _CLASSES) else None


def _bernoulli(fn: Any) -> bool:
    return isinstance(fn, (dist.BernoulliProbs, dist.BernoulliLogits))


def classes(fn: Any) -> tuple[int, bool] | None:
    """Number of classes of a site, and whether gradient can flow through its value, which is no index."""
    base = _of_classes(fn)
    if base is None:
        return None
    if _bernoulli(base):
        return 2, True
    return jnp.shape(base.logits)[-1], isinstance(base, OneHotCategorical)


def reparameterised(fn: Any) -> bool:
    """Whether draws are."""
    return bool(fn.has_rsample)


def elements(fn: Any) -> tuple[int, ...]:
    """The event of a site with classes, without the classes."""
    return tuple(fn.event_shape)[: len(fn.event_shape) - len(_of_classes(fn).event_shape)]


def weights(fn: Any) -> int:
    """How many weights of classes make a value; 0 of a site without classes."""
    known = classes(fn)
    return 0 if known is None else math.prod(elements(fn)) * known[0]


def log_probs(fn: Any) -> Array:
    """Log probabilities of a site's classes, `[*batch, *elements, V]`."""
    base = _of_classes(fn)
    if _bernoulli(base):
        found = jnp.stack([jax.nn.log_sigmoid(-base.logits), jax.nn.log_sigmoid(base.logits)], -1)
    else:
        found = base.logits if isinstance(base, OneHotCategorical) else jax.nn.log_softmax(base.logits, -1)
    return jnp.broadcast_to(found, (*fn.batch_shape, *elements(fn), found.shape[-1]))


def classes_of(fn: Any, value: Array) -> Array:
    """A value as weights of its classes, `[*batch, *elements, V]`: one-hots where it is hard."""
    base = _of_classes(fn)
    if isinstance(base, OneHotCategorical):
        return value
    dtype = jnp.result_type(base.logits)
    if _bernoulli(base):
        return jnp.stack([1.0 - value, value], -1).astype(dtype)
    return jax.nn.one_hot(value, jnp.shape(base.logits)[-1], dtype=dtype)


def embed(fn: Any, weights: Array) -> Array:
    """The inverse of `classes_of`; of an index, for one-hots."""
    base = _of_classes(fn)
    if isinstance(base, OneHotCategorical):
        return weights
    return weights[..., 1] if _bernoulli(base) else jnp.argmax(weights, -1)


def site_log_prob(site: Message) -> Array:
    if "log_prob" in site:  # of a scan, taken step by step
        return site["log_prob"]
    if is_fresh(site):
        return site["fresh"].log_prob
    if "of_classes" in site:
        return _log_prob_of_classes(site["fn"], site["value"], site["of_classes"])
    return site["fn"].log_prob(site["value"])


def is_whole(site: Message) -> bool:
    """Whether a value is one draw of the site's distribution, and nothing of it is masked."""
    return not isinstance(site["fn"], Chain) and "drawn" not in site and not _masks(site["fn"])


def _log_prob_of_classes(fn: Any, value: Array, density: Density) -> Array:
    """The log density of a site with classes, that of each element given."""
    if isinstance(fn, dist.MaskedDistribution):
        return jnp.where(fn._mask, _log_prob_of_classes(fn.base_dist, value, density), 0.0)
    if isinstance(fn, dist.ExpandedDistribution):
        return _log_prob_of_classes(fn.base_dist, value, density)
    if isinstance(fn, dist.Independent):
        return _summed(_log_prob_of_classes(fn.base_dist, value, density), fn.reinterpreted_batch_ndims)
    return density(log_probs(fn), classes_of(fn, value))


def apart(fn: Any) -> Any:
    """The distribution of the elements of an event."""
    base = _strip(fn)
    while isinstance(base, dist.Independent):
        base = _strip(base.base_dist)
    return base


def elementwise(fn: Any) -> bool:
    """Whether the elements are independent, and draws."""
    base = apart(fn)
    return not is_point(fn) and (not base.event_shape or isinstance(base, OneHotCategorical))


def finite_support(fn: Any) -> np.ndarray | None:
    base = apart(fn)
    if not base.has_enumerate_support:
        return None
    atoms = np.asarray(base.enumerate_support(expand=False))
    return product_support(atoms.reshape(len(atoms), *base.event_shape), fn.event_shape)


def most(fn: Any) -> float | None:
    """log V of a finite support, however large."""
    base = apart(fn)
    if not base.has_enumerate_support:
        return None
    return log_values(len(base.enumerate_support(expand=False)), base.event_shape, fn.event_shape)


def support_value(fn: Any, support: np.ndarray | None, index: Any, as_float: bool) -> Array:
    """The values of a finite support at `index`; zeros and ones as `draw` has them."""
    value = jnp.asarray(support)[index]
    return value.astype(jnp.zeros(()).dtype) if as_float and _boolean(fn) else value


def _family(fn: Any) -> str:
    """The name that probabilities and logits have in common."""
    return type(fn).__name__.removesuffix("Probs").removesuffix("Logits")


def kl(q: Any, p: Any) -> Array:
    if isinstance(q, Chain) or isinstance(p, Chain):
        raise NotImplementedError("sites inside a scan")
    mask = q._mask if isinstance(q, dist.MaskedDistribution) else None
    q, p = _strip(q), _strip(p)
    if is_point(q):
        value = q.log_prob(q.mean) - p.log_prob(q.mean)
    elif isinstance(q, dist.Independent) and isinstance(p, dist.Independent):
        inner = kl(q.base_dist, p.base_dist)
        inner = jnp.broadcast_to(
            inner, jnp.broadcast_shapes(inner.shape, q.base_dist.batch_shape, p.base_dist.batch_shape)
        )
        value = inner.sum(tuple(range(-q.reinterpreted_batch_ndims, 0)))
    elif isinstance(q, OneHotCategorical) and isinstance(p, OneHotCategorical):
        value = (q.probs * (q.logits - p.logits)).sum(-1)
    elif isinstance(q, _jax_structured.CLOSED) and type(q) is type(p):
        value = _jax_structured.kl(q, p)
    elif q.has_enumerate_support and (_family(q) == _family(p) or isinstance(p, _jax_mixtures.Labels)):
        values = q.enumerate_support(expand=False)
        log_q, log_p = q.log_prob(values), p.log_prob(values)
        value = (jnp.exp(log_q) * (log_q - log_p)).sum(0)
    elif isinstance(q, dist.TransformedDistribution) and getattr(p, "transforms", None) == q.transforms:
        # A bijection that both share changes no KL; the library knows none of transformed distributions.
        value = kl(q.base_dist, p.base_dist)
        extra = q.event_dim - q.base_dist.event_dim
        value = value.sum(tuple(range(-extra, 0))) if extra else value
    else:
        value = kl_divergence(q, p)
    return value if mask is None else jnp.where(mask, value, 0.0)


def _masks(fn: Any) -> list[np.ndarray]:
    found = []
    while hasattr(fn, "base_dist"):
        found.append(getattr(fn, "_mask", None))
        fn = fn.base_dist
    return [np.asarray(m) for m in found if m is not None and m is not True]


def has_kl(q: Any, p: Any) -> bool:
    """Whether it is known, and both densities count at the same elements."""
    if len(_masks(q)) != len(_masks(p)) or not all(map(np.array_equal, _masks(q), _masks(p))):
        return False
    try:
        kl(q, p)
    except NotImplementedError:
        return False
    return True


def _solve(lower: Array, b: Array) -> Array:
    return jax.scipy.linalg.solve_triangular(lower, b[..., None], lower=True)[..., 0]


class GuideSite:
    """A guide site as an estimator sees it (see `algorithm.SiteDistribution`).

    `given(name, event_dim)` is what was injected under the site's name, or its noise's.
    """

    def __init__(
        self,
        name: str,
        fn: Any,
        key: Array,
        given: Callable[[str, int], Array | None],
        support: np.ndarray | None,
        as_float: bool,
        own: Mapping[str, Array] | None = None,
        rows: Callable[[], Array] = lambda: jnp.zeros(0),
    ) -> None:
        self._name, self._fn, self._key, self._given, self._support = name, fn, key, given, support
        self._as_float, self._noisy = as_float, False
        self.fresh: Fresh | None = None
        """What `rsample` drew, where its density is known from the noise."""
        self.own, self.rows = own or {}, rows

    @cached_property
    def _injected(self) -> Array | None:
        return self._given(self._name, self._fn.event_dim)

    def check_used(self) -> None:
        """Refuses a value that was injected where noise was asked for instead."""
        if self._noisy and "_injected" not in self.__dict__:
            check_injected(self._name, self._injected)

    def sample(self) -> Array:
        value = self._injected
        if value is None:
            value = draw(self._fn, self._key, self._as_float)
        return jax.lax.stop_gradient(value)

    def rsample(self) -> Array:
        if self._injected is not None:
            return rebuild(self._fn, self._injected, _solve)
        drawn = fresh(self._fn, self._key)
        if drawn is None:
            return self._fn.sample(self._key)
        self.fresh = Fresh(self._fn, *drawn)
        return self.fresh.value

    def mean(self) -> Array:
        return self._fn.mean if self._injected is None else self._injected

    def log_prob(self, value: Array) -> Array:
        return self._fn.log_prob(value)

    def log_probs(self) -> Array:
        return log_probs(self._fn)

    def embed(self, weights: Array) -> Array:
        return embed(self._fn, weights)

    def classes_of(self, value: Array) -> Array:
        return classes_of(self._fn, value)

    def uniform(self, salt: int = 0, copies: int | None = None) -> Array:
        self._noisy = True
        like = self.log_probs()
        event = len(elements(self._fn)) + 1
        lead = () if copies is None else (copies,)
        injected = self._given(noise_name(self._name, salt), event + len(lead))
        if injected is not None:
            return injected if copies is None else jnp.moveaxis(injected, -event - 1, 0)
        key = jax.random.fold_in(jax.random.fold_in(self._key, _NOISE), salt)
        return jax.random.uniform(key, lead + like.shape, like.dtype, minval=jnp.finfo(like.dtype).tiny)

    def explore(self, epsilon: float) -> tuple[Array, int]:
        assert self._support is not None
        drawn, size = self.sample(), len(self._support)
        if self._injected is not None:
            return drawn, size
        where, which = (jax.random.fold_in(self._key, i) for i in (1, 2))
        batch = self._fn.batch_shape
        stray = jax.random.uniform(where, batch) < epsilon
        index = jax.random.randint(which, batch, 0, size)
        return jnp.where(stray.reshape(batch + (1,) * len(self._fn.event_shape)), self.select(index), drawn), size

    def select(self, index: Array) -> Array:
        value = support_value(self._fn, self._support, index, self._as_float)
        return jnp.broadcast_to(value, self._fn.batch_shape + self._fn.event_shape)
