"""`ppl_lvm.ops` for jax arrays."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as xp
import numpy as np

__all__ = [
    "cholesky",
    "concrete",
    "derivatives",
    "digamma",
    "eye",
    "lgamma",
    "log_softmax",
    "logsumexp",
    "one_hot",
    "remember",
    "scan",
    "softmax",
    "solve_triangular",
    "steps_are_dear",
    "stop_gradient",
    "xp",
    "zeros",
]

Array = jax.Array

_ZERO: ContextVar[Array | None] = ContextVar("zero", default=None)


@jax.custom_jvp
def _stop_once(x: Array) -> Array:
    return x


@_stop_once.defjvp
def _no_tangent(primals: tuple[Any], tangents: tuple[Any]) -> tuple[Any, Any]:
    # The plain value, so that a derivative around this one finds nothing stopped.
    return primals[0], xp.zeros_like(tangents[0])


@contextlib.contextmanager
def stopped_once(zero: Array) -> Iterator[None]:
    """What is stopped in this block is stopped for the innermost derivative alone, that with respect to `zero` too.

    A gradient g is a function of what its surrogate stopped as well: a derivative of g around it sees that. `zero` is
    an argument of the differentiated function, of value zero: added to what is stopped, it makes all of it the
    innermost derivative's own.
    """
    before = _ZERO.set(zero)
    try:
        yield
    finally:
        _ZERO.reset(before)


def stop_gradient(x: Array) -> Array:
    zero = _ZERO.get()
    if zero is None or not xp.issubdtype(xp.result_type(x), xp.floating):
        return jax.lax.stop_gradient(x)
    return _stop_once(x + zero.astype(xp.result_type(x)))


def logsumexp(x: Array, axis: int) -> Array:
    return jax.scipy.special.logsumexp(x, axis=axis)


def softmax(x: Array, axis: int) -> Array:
    return jax.nn.softmax(x, axis=axis)


def log_softmax(x: Array, axis: int) -> Array:
    return jax.nn.log_softmax(x, axis=axis)


def lgamma(x: Array) -> Array:
    return jax.scipy.special.gammaln(x)


def digamma(x: Array) -> Array:
    return jax.scipy.special.digamma(x)


def one_hot(index: Array, classes: int) -> Array:
    # Labels among data may come as floats.
    return jax.nn.one_hot(xp.asarray(index, int), classes, dtype=xp.zeros(()).dtype)


def zeros(shape: tuple[int, ...], like: Array) -> Array:
    return xp.zeros(shape, dtype=like.dtype)


def eye(n: int, like: Array) -> Array:
    return xp.eye(n, dtype=like.dtype)


def cholesky(x: Array) -> Array:
    return jax.lax.linalg.cholesky(x, symmetrize_input=False)


def solve_triangular(lower: Array, b: Array, transposed: bool) -> Array:
    batch = xp.broadcast_shapes(lower.shape[:-2], b.shape[:-2])
    lower, b = (xp.broadcast_to(a, (*batch, *a.shape[-2:])) for a in (lower, b))
    return jax.scipy.linalg.solve_triangular(lower, b, lower=True, trans=int(transposed))


FEW_STEPS = 200


def scan(
    step: Callable[[Any, Any], tuple[Any, Any]], init: Any, xs: tuple[Array, ...], reverse: bool
) -> tuple[Any, Any]:
    # Where values are at hand, as when a program is looked at, JAX would compile the scan anew at every look.
    steps = xs[0].shape[0]
    if not 0 < steps <= FEW_STEPS or _traced((init, xs)):
        return jax.lax.scan(step, init, xs, reverse=reverse)
    carry = init
    ys: list[Any] = []
    for t in reversed(range(steps)) if reverse else range(steps):
        carry, y = step(carry, jax.tree.map(lambda x, t=t: x[t], xs))
        if not ys and _traced((carry, y)):  # through what the step closes over
            return jax.lax.scan(step, init, xs, reverse=reverse)
        ys.append(y)
    return carry, jax.tree.map(lambda *parts: xp.stack(parts), *(reversed(ys) if reverse else ys))


def _traced(tree: Any) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def steps_are_dear(like: Array) -> bool:
    return platform() != "cpu"


def platform() -> str:
    """Where what is made here goes: "cpu", "gpu", "tpu". `jax.default_backend()` overlooks `jax.default_device`."""
    device = getattr(jax.config, "jax_default_device", None)
    return str(getattr(device, "platform", device) or jax.default_backend())


def concrete(x: Array) -> np.ndarray | None:
    return None if isinstance(x, jax.core.Tracer) else np.asarray(x)


def remember(kept: dict[Any, Any], name: str, compute: Callable[[], Any]) -> Any:
    return compute()


def derivatives(f: Callable[[Array, int], Array], x: Array, axis: int) -> tuple[Array, Array]:
    x = jax.lax.stop_gradient(x)
    gradient = jax.grad(lambda y: f(y, axis).sum())
    moved = xp.moveaxis(x, axis, 0)

    def second(k: int) -> Array:
        # Rows are independent, so pushing the k-th entry of every row at once gives its own second derivative.
        tangent = xp.moveaxis(xp.zeros_like(moved).at[k].set(1.0), 0, axis)
        return xp.moveaxis(jax.jvp(gradient, (x,), (tangent,))[1], axis, 0)[k]

    diagonal = xp.stack([second(k) for k in range(x.shape[axis])], axis)
    return jax.lax.stop_gradient(gradient(x)), jax.lax.stop_gradient(diagonal)
