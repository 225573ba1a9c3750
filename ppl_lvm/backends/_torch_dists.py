"""Distributions of torch as the engine needs them: traceable draws, densities linear in one-hots, supports, KL."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor
from torch.distributions import kl_divergence

from ppl_lvm import ops
from ppl_lvm.backends.base import Chain, is_point, log_values, product_support, rebuild

Message = Any


def _one_hot(fn: Any) -> bool:
    return isinstance(fn, torch.distributions.OneHotCategorical)


def draw(fn: Any) -> Tensor:
    if isinstance(fn, torch.distributions.Independent):
        return draw(fn.base_dist)
    if _one_hot(fn):
        # torch's own sampler reads the value back to the host, which stalls a GPU and cannot be traced.
        index = torch.multinomial(fn.probs.reshape(-1, fn.event_shape[0]), 1)
        return ops.one_hot(index.reshape(fn.batch_shape), fn.event_shape[0]).to(fn.probs.dtype)
    return fn.sample()


def log_prob(fn: Any, value: Tensor) -> Tensor:
    """`fn.log_prob`, but linear in the value of a one-hot, where torch takes the argmax and loses the gradient.

    Of a binomial, a common likelihood of images, the same number in fewer operations.
    """
    if isinstance(fn, torch.distributions.Independent):
        inner = log_prob(fn.base_dist, value)
        n = fn.reinterpreted_batch_ndims
        return inner.reshape(inner.shape[: inner.dim() - n] + (-1,)).sum(-1) if n else inner
    if _one_hot(fn):
        return (value * fn.logits).sum(-1)
    if _binomial(fn):
        count = _unexpanded(fn.total_count)
        choose = torch.lgamma(count + 1) - torch.lgamma(value + 1) - torch.lgamma(count - value + 1)
        return value * fn.logits - count * torch.nn.functional.softplus(fn.logits, threshold=40) + choose
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
    value = log_prob(site["fn"], site["value"])
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

    `remember(draw)` gives a draw that an earlier run of the same table made, where the two share it.
    """

    def __init__(
        self,
        fn: Any,
        injected: Tensor | None,
        support: np.ndarray | None,
        stride: int,
        dim: int,
        remember: Callable[[Callable[[], Tensor]], Tensor],
    ) -> None:
        self._fn, self._injected, self._support = fn, injected, support
        self._stride, self._dim, self._remember = stride, dim, remember

    def _share(self, value: Tensor) -> Tensor:
        """One value for the entries that differ only in variants drawn later."""
        if self._stride == 1:
            return value
        dim = self._dim - self._fn.event_dim
        t = torch.arange(value.shape[dim], device=value.device)
        return value.index_select(dim, t // self._stride * self._stride)

    def sample(self) -> Tensor:
        if self._injected is not None:
            return self._injected.detach()
        return self._remember(lambda: self._share(draw(self._fn).detach()))

    def rsample(self) -> Tensor:
        if self._injected is not None:
            return rebuild(self._fn, self._injected, _solve)
        return self._remember(lambda: self._share(self._fn.rsample()))

    def log_prob(self, value: Tensor) -> Tensor:
        return log_prob(self._fn, value)

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
