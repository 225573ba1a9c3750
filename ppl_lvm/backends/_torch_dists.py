"""Distributions of torch as the engine needs them: traceable draws, densities linear in one-hots, supports, KL."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import pyro
import torch
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import kl_divergence

from ppl_lvm import ops
from ppl_lvm.backends.sites import Chain, Fresh, is_fresh, is_point, log_values, product_support, rebuild
from ppl_lvm.backends.structure import check_injected, noise_name

HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)

Message = Any
Density = Callable[[Tensor, Tensor], Tensor]
"""`(log probabilities, weights) -> log density` of elements with classes, `[..., V], [..., V] -> [...]`."""


def _one_hot(fn: Any) -> bool:
    return isinstance(fn, torch.distributions.OneHotCategorical)


def _of_classes(fn: Any) -> Any:
    """The one-hot, categorical or Bernoulli distribution inside `to_event`, masks and expansions; None if it is none.
    """
    fn = fn.of if isinstance(fn, Chain) else fn
    while isinstance(fn, torch.distributions.Independent | MaskedDistribution | ExpandedDistribution):
        fn = fn.base_dist
    known = torch.distributions.Categorical | torch.distributions.Bernoulli
    return fn if _one_hot(fn) or isinstance(fn, known) else None


def classes(fn: Any) -> tuple[int, bool] | None:
    """Number of classes of a site, and whether gradient can flow through its value, which is no index."""
    base = _of_classes(fn)
    if base is None:
        return None
    if isinstance(base, torch.distributions.Bernoulli):
        return 2, True
    return base.logits.shape[-1], _one_hot(base)


def reparameterised(fn: Any) -> bool:
    """Whether draws are; the library's straight-through one-hots say so of theirs, whose gradient is biased."""
    return bool(fn.has_rsample) and _of_classes(fn) is None


def elements(fn: Any) -> tuple[int, ...]:
    """The event of a site with classes, without the classes."""
    return tuple(fn.event_shape)[: len(fn.event_shape) - len(_of_classes(fn).event_shape)]


def weights(fn: Any) -> int:
    """How many weights of classes make a value; 0 of a site without classes."""
    known = classes(fn)
    return 0 if known is None else math.prod(elements(fn)) * known[0]


def log_probs(fn: Any) -> Tensor:
    """Log probabilities of a site's classes, `[*batch, *elements, V]`."""
    base = _of_classes(fn)
    logits = base.logits
    if isinstance(base, torch.distributions.Bernoulli):
        found = torch.stack([torch.nn.functional.logsigmoid(-logits), torch.nn.functional.logsigmoid(logits)], -1)
    else:
        found = logits  # a categorical of torch normalises them
    return found.expand(*fn.batch_shape, *elements(fn), found.shape[-1])


def classes_of(fn: Any, value: Tensor) -> Tensor:
    """A value as weights of its classes, `[*batch, *elements, V]`: one-hots where it is hard."""
    base = _of_classes(fn)
    if _one_hot(base):
        return value
    if isinstance(base, torch.distributions.Bernoulli):
        return torch.stack([1.0 - value, value], -1)
    return ops.one_hot(value, base.logits.shape[-1])


def embed(fn: Any, weights: Tensor) -> Tensor:
    """The inverse of `classes_of`; of an index, for one-hots."""
    base = _of_classes(fn)
    if _one_hot(base):
        return weights
    if isinstance(base, torch.distributions.Bernoulli):
        return weights[..., 1]
    return weights.argmax(-1)


def draw(fn: Any) -> Tensor:
    if isinstance(fn, torch.distributions.Independent | MaskedDistribution):
        return draw(fn.base_dist)
    if _one_hot(fn):
        index = _drawn_class(fn._categorical)
        return ops.one_hot(index, fn.event_shape[0]).to(fn._param.dtype)
    if isinstance(fn, torch.distributions.Categorical):
        return _drawn_class(fn)
    if isinstance(fn, torch.distributions.Bernoulli):
        # A compiler draws torch's own from single-precision uniforms, others than an uncompiled step has.
        return (torch.rand(fn.batch_shape, dtype=fn.probs.dtype, device=fn.probs.device) < fn.probs).to(fn.probs.dtype)
    return fn.sample()


def _drawn_class(fn: Any) -> Tensor:
    """A draw of a categorical, `[*batch]`: the class in whose part of the unit interval a uniform falls.

    torch's own sampler takes an exponential for every class, a dozen nanoseconds each, and reads back to the host.
    """
    with torch.no_grad():
        ends = (_unexpanded(fn.probs) if "probs" in vars(fn) else _unexpanded(fn.logits).exp()).cumsum(-1)
        # By the last end, so that a class of probability zero is never drawn, as a uniform is below one.
        uniform = torch.rand(fn.batch_shape, dtype=ends.dtype, device=ends.device)
        return (uniform.unsqueeze(-1) >= ends[..., :-1] / ends[..., -1:]).sum(-1)


def fresh(fn: Any) -> tuple[Tensor, Tensor] | None:
    """`fn.rsample()` and its log density, written in the standard normal noise behind the draw.

    For `z = T(e; fn)` that is `log N(e) - log |det dT/de|`, which needs no way back from z to e; it has the gradient
    of `fn.log_prob(z)` where z carries its own. None of a distribution that is not known as such a T.
    """
    if type(fn) is pyro.distributions.Normal:
        noise = _noise(fn)
        return fn.loc + noise * fn.scale, -0.5 * noise.square() - (fn.scale.log() + HALF_LOG_2PI)
    if type(fn) is pyro.distributions.MultivariateNormal:
        noise, factor = _noise(fn), _unexpanded(fn.scale_tril)
        log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_q = -0.5 * noise.square().sum(-1) - (log_det + fn.event_shape[0] * HALF_LOG_2PI)
        return fn.loc + torch.matmul(factor, noise.unsqueeze(-1)).squeeze(-1), log_q
    independent = isinstance(fn, torch.distributions.Independent)
    inner = fresh(fn.base_dist) if independent or _transformed(fn) else None
    if inner is None:
        return None
    value, log_q = inner
    if independent:
        return value, _summed(log_q, fn.reinterpreted_batch_ndims)
    event_dim = fn.base_dist.event_dim
    for transform in fn.transforms:
        before, value = value, transform(value)
        event_dim -= transform.domain.event_dim
        log_q = log_q - _summed(transform.log_abs_det_jacobian(before, value), event_dim)
        event_dim += transform.codomain.event_dim
    return value, log_q


def _noise(fn: Any) -> Tensor:
    return torch.empty(fn.batch_shape + fn.event_shape, dtype=fn.loc.dtype, device=fn.loc.device).normal_()


def _transformed(fn: Any) -> bool:
    """Whether a distribution is another's draws, transformed, and nothing else."""
    kind, general = type(fn), torch.distributions.TransformedDistribution
    return isinstance(fn, general) and kind.rsample is general.rsample and kind.log_prob is general.log_prob


def _summed(x: Tensor, n: int) -> Tensor:
    """The sum over the last n axes."""
    return x.reshape(x.shape[: x.dim() - n] + (-1,)).sum(-1) if n else x


def log_prob(fn: Any, value: Tensor, of_classes: Density | None = None) -> Tensor:
    """`fn.log_prob`, but linear in the value of a one-hot, where torch takes the argmax and loses the gradient.

    Of a normal, and of a binomial, a common likelihood of images, the same number in fewer operations. `of_classes` is
    the density of each element of a site with classes, in the place of the distribution's own.
    """
    if isinstance(fn, torch.distributions.Independent):
        return _summed(log_prob(fn.base_dist, value, of_classes), fn.reinterpreted_batch_ndims)
    if isinstance(fn, MaskedDistribution) and fn._mask is not False and _of_classes(fn) is not None:
        return scale_and_mask(log_prob(fn.base_dist, value, of_classes), mask=fn._mask)
    if of_classes is not None and not isinstance(fn, MaskedDistribution):
        return of_classes(log_probs(fn), classes_of(fn, value))
    if _one_hot(fn):
        return (value * fn.logits).sum(-1)
    if _binomial(fn):
        count = _unexpanded(fn.total_count)
        choose = torch.lgamma(count + 1) - torch.lgamma(value + 1) - torch.lgamma(count - value + 1)
        return value * fn.logits - count * torch.nn.functional.softplus(fn.logits, threshold=40) + choose
    if type(fn) is pyro.distributions.Normal:
        return -0.5 * ((value - fn.loc) / fn.scale).square() - (fn.scale.log() + HALF_LOG_2PI)
    with _unvalidated(fn):
        return fn.log_prob(value)


@contextlib.contextmanager
def _unvalidated(fn: Any) -> Iterator[None]:
    """A distribution made before validation was switched off (a PyroSample's prior) reads values back to the host."""
    validated = []
    inner = fn
    while inner is not None:
        if inner._validate_args:
            validated.append(inner)
            inner._validate_args = False
        inner = getattr(inner, "base_dist", None)
    try:
        yield
    finally:
        for inner in validated:
            inner._validate_args = True


def _binomial(fn: Any) -> bool:
    """Pyro's, whose own density takes `lgamma` of the same counts at every draw, and three times the operations."""
    return type(fn) is pyro.distributions.Binomial and not fn.approx_log_prob_tol


def _unexpanded(x: Tensor) -> Tensor:
    """One entry along the axes that `x` was expanded over."""
    return x[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.stride())] if x.dim() else x


def site_log_prob(site: Message) -> Tensor:
    if "log_prob" in site:  # of a scan, taken step by step
        return site["log_prob"]
    value = site["fresh"].log_prob if is_fresh(site) else log_prob(site["fn"], site["value"], site.get("of_classes"))
    mask = site["mask"]
    if mask is None or mask is True:
        return value
    return torch.where(torch.as_tensor(mask), value, torch.zeros_like(value))


def kl(q: Message, p: Message) -> Tensor:
    if isinstance(q["fn"], Chain) or isinstance(p["fn"], Chain):
        raise NotImplementedError("sites inside a scan")
    if is_point(q["fn"]):
        # Pyro's own leaves out a point's density.
        at = q["fn"].mean
        value = log_prob(q["fn"], at) - log_prob(p["fn"], at)
    else:
        # Some of torch's formulas index one distribution's terms by the other's shape.
        shape = torch.broadcast_shapes(q["fn"].batch_shape, p["fn"].batch_shape)
        value = kl_divergence(*(fn if fn.batch_shape == shape else fn.expand(shape) for fn in (q["fn"], p["fn"])))
    mask = q["mask"]
    return value if mask is None or mask is True else torch.where(mask, value, torch.zeros_like(value))


def _masks(site: Message) -> list[Tensor]:
    found, fn = [site["mask"]], site["fn"]
    while hasattr(fn, "base_dist"):
        found.append(getattr(fn, "_mask", None))
        fn = fn.base_dist
    return [torch.as_tensor(m) for m in found if m is not None and m is not True]


def has_kl(q: Message, p: Message) -> bool:
    """Whether the library knows it, and both densities count at the same elements."""
    if len(_masks(q)) != len(_masks(p)) or not all(map(torch.equal, _masks(q), _masks(p))):
        return False
    try:
        kl(q, p)
    except NotImplementedError:
        return False
    return True


def is_whole(site: Message) -> bool:
    """Whether a value is one draw of the site's distribution, and nothing of it is masked."""
    return not isinstance(site["fn"], Chain) and "drawn" not in site and not _masks(site)


def apart(fn: Any) -> Any:
    """The distribution of the elements of an event."""
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    return fn


def elementwise(fn: Any) -> bool:
    """Whether the elements are independent, and draws."""
    base = apart(fn)
    return not is_point(fn) and (not base.event_shape or _one_hot(base))


def _atoms(fn: Any) -> tuple[Tensor, torch.Size] | None:
    """The values of one element, and its shape."""
    base = fn
    while isinstance(base, torch.distributions.Independent) or type(base).__name__ == "MaskedDistribution":
        base = base.base_dist
    return (base.enumerate_support(expand=False), base.event_shape) if base.has_enumerate_support else None


def finite_support(fn: Any) -> np.ndarray | None:
    atoms = _atoms(fn)
    if atoms is None:
        return None
    return product_support(atoms[0].reshape(len(atoms[0]), *atoms[1]).numpy(), fn.event_shape)


def most(fn: Any) -> float | None:
    """log V of a finite support, however large."""
    atoms = _atoms(fn)
    return None if atoms is None else log_values(len(atoms[0]), atoms[1], fn.event_shape)


def support_value(support: np.ndarray | None, index: Any) -> Tensor:
    """The values of a finite support at `index`, in the default dtype where they are floats."""
    assert support is not None
    like = torch.as_tensor(support)
    return (like.to(torch.get_default_dtype()) if like.is_floating_point() else like)[index]


def _solve(lower: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(lower, b.unsqueeze(-1), upper=False).squeeze(-1)


class GuideSite:
    """A guide site as an estimator sees it (see `algorithm.SiteDistribution`); its draws axis is `dim`.

    `given(name, event_dim)` is what was injected under the site's name, or its noise's. `remember(draw)` gives a draw
    that an earlier run of the same table made, where the two share it.
    """

    def __init__(
        self,
        name: str,
        fn: Any,
        given: Callable[[str, int], Tensor | None],
        support: np.ndarray | None,
        stride: int,
        dim: int,
        remember: Callable[[Callable[[], Tensor]], Tensor],
        own: Mapping[str, Tensor] | None = None,
        rows: Callable[[], Tensor] = lambda: torch.zeros(0),
    ) -> None:
        self._name, self._fn, self._given, self._support = name, fn, given, support
        self._stride, self._dim, self._remember = stride, dim, remember
        self._noise: dict[tuple[int, int | None], Tensor] = {}
        self.fresh: Fresh | None = None
        """What `rsample` drew, where its density is known from the noise."""
        self.own, self.rows = own or {}, rows

    @cached_property
    def _injected(self) -> Tensor | None:
        return self._given(self._name, self._fn.event_dim)

    def check_used(self) -> None:
        """Refuses a value that was injected where noise was asked for instead."""
        if self._noise and "_injected" not in self.__dict__:
            check_injected(self._name, self._injected)

    def _share(self, value: Tensor, event_dim: int | None = None) -> Tensor:
        """One value for the entries that differ only in variants drawn later."""
        if self._stride == 1:
            return value
        dim = self._dim - (self._fn.event_dim if event_dim is None else event_dim)
        t = torch.arange(value.shape[dim], device=value.device)
        return value.index_select(dim, t // self._stride * self._stride)

    @cached_property
    def _drawn(self) -> Tensor:
        if self._injected is not None:
            return self._injected.detach()
        return self._remember(lambda: self._share(draw(self._fn).detach()))

    def sample(self) -> Tensor:
        return self._drawn

    def rsample(self) -> Tensor:
        if self._injected is not None:
            return rebuild(self._fn, self._injected, _solve)
        return self._remember(self._rsample)

    def _rsample(self) -> Tensor:
        # Entries that share a draw need not share its distribution, nor a run that takes over the draw of another.
        drawn = fresh(self._fn) if self._stride == 1 else None
        if drawn is None:
            return self._share(self._fn.rsample())
        self.fresh = Fresh(self._fn, *drawn)
        return self.fresh.value

    def mean(self) -> Tensor:
        return self._fn.mean if self._injected is None else self._injected

    def log_prob(self, value: Tensor) -> Tensor:
        return log_prob(self._fn, value)

    def log_probs(self) -> Tensor:
        return log_probs(self._fn)

    def embed(self, weights: Tensor) -> Tensor:
        return embed(self._fn, weights)

    def classes_of(self, value: Tensor) -> Tensor:
        return classes_of(self._fn, value)

    def uniform(self, salt: int = 0, copies: int | None = None) -> Tensor:
        if (salt, copies) not in self._noise:
            self._noise[salt, copies] = self._uniform(salt, copies)
        return self._noise[salt, copies]

    def _uniform(self, salt: int, copies: int | None) -> Tensor:
        like = self.log_probs()
        event = len(elements(self._fn)) + 1
        lead = () if copies is None else (copies,)
        injected = self._given(noise_name(self._name, salt), event + len(lead))
        if injected is not None:
            return injected if copies is None else injected.movedim(-event - 1, 0)

        def noise() -> Tensor:
            u = torch.rand(lead + tuple(like.shape), dtype=like.dtype, device=like.device)
            return self._share(u.clamp_min(torch.finfo(u.dtype).tiny), event)

        return self._remember(noise)

    def explore(self, epsilon: float) -> tuple[Tensor, int]:
        assert self._support is not None
        drawn = self.sample()
        size, batch = len(self._support), self._fn.batch_shape
        if self._injected is not None:
            return drawn, size

        def elsewhere() -> Tensor:
            index = torch.floor(torch.rand(batch, dtype=torch.float64) * size).long()
            event = (1,) * len(self._fn.event_shape)
            stray = (torch.rand(batch) < epsilon).reshape(batch + event)
            return self._share(torch.where(stray, self.select(index), drawn))

        return self._remember(elsewhere), size

    def select(self, index: Tensor) -> Tensor:
        return support_value(self._support, index).expand(self._fn.batch_shape + self._fn.event_shape)
