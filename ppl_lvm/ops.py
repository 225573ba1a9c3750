"""The array functions that objectives and estimators use, dispatched on the type of the array.

`xp(x)` is the array namespace of `x` (jax.numpy, or array-api-compat's torch). The other functions are what the
array API lacks. The list is closed and short: an algorithm that needs more probably belongs in a backend.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np

Array = Any
"""A torch tensor or a jax array (or a tracer of either)."""


_LOADED: dict[str, Any] = {}


def _of(x: Array) -> Any:
    root = type(x).__module__.partition(".")[0]
    # Pyro's provenance tensors are torch tensors that live in a pyro module.
    return _module("_torch_ops" if root in ("torch", "pyro") else "_jax_ops")


def _module(name: str) -> Any:
    # Looked up and not cached by functools, whose wrapper torch.compile goes past, to an import that it cannot trace.
    if name not in _LOADED:
        _LOADED[name] = importlib.import_module(f"ppl_lvm.backends.{name}")
    return _LOADED[name]


def xp(x: Array) -> Any:
    """The array namespace of `x`."""
    return _of(x).xp


def stop_gradient(x: Array) -> Array:
    """The value of `x`, carrying no gradient."""
    return _of(x).stop_gradient(x)


def logsumexp(x: Array, axis: int) -> Array:
    """`log sum exp x` along `axis`."""
    return _of(x).logsumexp(x, axis)


def log_mean_exp(x: Array, axis: int) -> Array:
    """`log mean exp x` along `axis`: the f of importance-weighted bounds, with closed-form derivatives."""
    return logsumexp(x, axis) - math.log(x.shape[axis])


class grouped_log_mean_exp:
    """`1/G sum_g log mean_{k in g} exp x_k` along an axis of G groups of the same size, one after the other."""

    def __init__(self, groups: int) -> None:
        self.groups = groups

    def _split(self, x: Array, axis: int) -> Array:
        shape = tuple(x.shape)
        size = shape[axis] // self.groups
        return xp(x).reshape(x, (*shape[:axis], self.groups, size, *shape[axis + 1 :]))

    def __call__(self, x: Array, axis: int) -> Array:
        return xp(x).mean(log_mean_exp(self._split(x, axis), axis + 1), axis=axis)

    def derivatives(self, x: Array, axis: int) -> tuple[Array, Array]:
        w = xp(x).reshape(softmax(self._split(x, axis), axis + 1), tuple(x.shape))
        return w / self.groups, (w - w * w) / self.groups


def leave_one_out_mean(x: Array, axis: int = 1) -> Array:
    """For every entry of `axis` the mean of the other entries; the axis needs two or more."""
    return (xp(x).sum(x, axis=axis, keepdims=True) - x) / (x.shape[axis] - 1)


def softmax(x: Array, axis: int) -> Array:
    """`exp x / sum exp x` along `axis`."""
    return _of(x).softmax(x, axis)


def log_softmax(x: Array, axis: int) -> Array:
    """`x - log sum exp x` along `axis`."""
    return _of(x).log_softmax(x, axis)


def lgamma(x: Array) -> Array:
    """`log Gamma(x)` of a positive x."""
    return _of(x).lgamma(x)


def digamma(x: Array) -> Array:
    """The derivative of `lgamma`."""
    return _of(x).digamma(x)


def one_hot(index: Array, classes: int) -> Array:
    """One-hot vectors `[..., classes]` in the default floating dtype, without reading a value on the host."""
    return _of(index).one_hot(index, classes)


def zeros(shape: tuple[int, ...], like: Array) -> Array:
    """Zeros of the dtype and on the device of `like`."""
    return _of(like).zeros(shape, like)


def eye(n: int, like: Array) -> Array:
    """The identity matrix of the dtype and on the device of `like`."""
    return _of(like).eye(n, like)


def cholesky(x: Array) -> Array:
    """The lower L of `L L' = x`, from the lower half of x `[..., D, D]`; NaN where x is not positive definite."""
    return _of(x).cholesky(x)


def solve_triangular(lower: Array, b: Array, transposed: bool = False) -> Array:
    """`lower^-1 b`, or `lower'^-1 b`, of matrices `[..., D, D]` and `[..., D, R]` whose batches broadcast."""
    return _of(lower).solve_triangular(lower, b, transposed)


def scan(
    step: Callable[[Any, Any], tuple[Any, Any]], init: Any, xs: tuple[Array, ...], reverse: bool = False
) -> tuple[Any, Any]:
    """`carry, y = step(carry, x)` over the first axis of arrays: the last carry and all y, stacked.

    In reverse the last entries come first; every y stays at the place of its x.
    """
    return _of(xs[0]).scan(step, init, xs, reverse)


def steps_are_dear(like: Array) -> bool:
    """Whether a step of a loop costs a call or a kernel of its own, so that fewer of them on more rows pay."""
    return _of(like).steps_are_dear(like)


def concrete(x: Array) -> np.ndarray | None:
    """The values of `x`, or None where it stands for a value that is not there yet, inside a traced computation."""
    return _of(x).concrete(x)


def remember(like: Array, kept: dict[Any, Any], name: str, compute: Callable[[], Any]) -> Any:
    """`compute()`, or what it gave before in the same state of the library.

    Where a compiler merges the two anyway, and the result may belong to a trace that is over, it is computed anew.
    """
    return _of(like).remember(kept, name, compute)


def derivatives(f: Callable[[Array, int], Array], x: Array, axis: int) -> tuple[Array, Array]:
    """`df/dx_k` and `d2f/dx_k2` (the diagonal) for a function that reduces `axis`, both of x's shape.

    A function may bring the closed form as an attribute, `f.derivatives(x, axis)`; otherwise automatic
    differentiation is used, whose cost is one forward pass per entry of `axis`.
    """
    closed = getattr(f, "derivatives", None)
    if closed is not None:
        return closed(x, axis)
    return _of(x).derivatives(f, x, axis)


def _log_mean_exp_derivatives(x: Array, axis: int) -> tuple[Array, Array]:
    w = softmax(x, axis)
    return w, w - w * w


log_mean_exp.derivatives = _log_mean_exp_derivatives  # type: ignore[attr-defined]
