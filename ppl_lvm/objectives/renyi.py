"""Rényi's variational bounds."""

from typing import Literal

from pydantic import Field

from ppl_lvm import ops
from ppl_lvm.algorithm import Number, Objective
from ppl_lvm.draws import Draws, Loss
from ppl_lvm.ops import Array


class renyi(Objective):
    """`E 1/(1 - alpha) log mean_k w_k^(1 - alpha)` per row: a lower bound on log p(x) for alpha of 0 or more.

    `alpha = 1` is the ELBO, 0 the importance-weighted bound, `"max"` the largest log weight (the limit to minus
    infinity), which like every negative alpha is no lower bound at many draws. `alpha` may be a schedule. With K draws
    it is the expectation of the K-draw bound that is optimised, of which gradients are unbiased.

    Source: Li and Turner (2016), arXiv:1602.02311.

    Example:
        >>> renyi(draws=10, alpha=0.5).alpha
        0.5
    """

    verbs = frozenset({"joint"})

    draws: int = Field(default=10, ge=1)
    alpha: Number | Literal["max"] = 0.5

    def smooth(self) -> bool:
        return self.alpha != "max"

    def __call__(self, d: Draws) -> Loss:
        f = largest if isinstance(self.alpha, str) else tempered(1.0 - self.alpha)  # type: ignore[operator]
        return Loss(-d.total(d.joint(f, d.log_w)))


def largest(x: Array, axis: int) -> Array:
    return ops.xp(x).max(x, axis=axis)


class tempered:
    """`1/s log mean exp(s x)`, and the mean at s = 0; s may be an array."""

    def __init__(self, s: Array | float) -> None:
        self.s = s

    def _safe(self, x: Array) -> tuple[Array, Array]:
        xp = ops.xp(x)
        s = ops.zeros((), x) + self.s
        zero = xp.abs(s) < 1e-6
        return zero, xp.where(zero, xp.ones_like(s), s)

    def __call__(self, x: Array, axis: int) -> Array:
        zero, s = self._safe(x)
        xp = ops.xp(x)
        return xp.where(zero, xp.mean(x, axis=axis), ops.log_mean_exp(s * x, axis) / s)

    def derivatives(self, x: Array, axis: int) -> tuple[Array, Array]:
        zero, s = self._safe(x)
        xp = ops.xp(x)
        w = ops.softmax(s * x, axis)
        even = 0.0 * x + 1.0 / x.shape[axis]
        return xp.where(zero, even, w), xp.where(zero, 0.0 * x, s * (w - w * w))
