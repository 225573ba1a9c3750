"""`ppl_lvm.ops` for jax arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as xp
import numpy as np

__all__ = [
    "concrete",
    "derivatives",
    "eye",
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


def stop_gradient(x: Array) -> Array:
    return jax.lax.stop_gradient(x)


def logsumexp(x: Array, axis: int) -> Array:
    return jax.scipy.special.logsumexp(x, axis=axis)


def softmax(x: Array, axis: int) -> Array:
    return jax.nn.softmax(x, axis=axis)


def log_softmax(x: Array, axis: int) -> Array:
    return jax.nn.log_softmax(x, axis=axis)


def one_hot(index: Array, classes: int) -> Array:
    return jax.nn.one_hot(index, classes, dtype=xp.zeros(()).dtype)


def zeros(shape: tuple[int, ...], like: Array) -> Array:
    return xp.zeros(shape, dtype=like.dtype)


def eye(n: int, like: Array) -> Array:
    return xp.eye(n, dtype=like.dtype)


def solve_triangular(lower: Array, b: Array, transposed: bool) -> Array:
    batch = xp.broadcast_shapes(lower.shape[:-2], b.shape[:-2])
    lower, b = (xp.broadcast_to(a, (*batch, *a.shape[-2:])) for a in (lower, b))
    return jax.scipy.linalg.solve_triangular(lower, b, lower=True, trans=int(transposed))


def scan(step: Callable[[Any, Any], tuple[Any, Any]], init: Any, xs: tuple[Array, ...]) -> tuple[Any, Any]:
    return jax.lax.scan(step, init, xs)


def steps_are_dear(like: Array) -> bool:
    return jax.default_backend() != "cpu"


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
