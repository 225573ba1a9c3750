"""f-divergences from the posterior to the guide, by name."""

from collections.abc import Callable
from typing import Literal

from pydantic import Field

from ppl_lvm import ops
from ppl_lvm.algorithm import Objective
from ppl_lvm.draws import Draws, Loss
from ppl_lvm.ops import Array, log_mean_exp

Name = Literal[
    "kl_reverse", "kl_forward", "jeffreys", "jensen_shannon", "hellinger", "chi_square", "neyman", "total_variation"
]


class f_divergence(Objective):
    """Guide: `E_q f(p(z | x) / q(z | x))` per row, for an f by name. Model: the importance-weighted bound.

    With `u = p(z | x) / q(z | x)`: kl_reverse `-log u`, KL(q || p); kl_forward `u log u`, KL(p || q); jeffreys
    `(u - 1) log u`; jensen_shannon `u log u - (1 + u) log((1 + u) / 2)`, halved; hellinger `(sqrt u - 1)^2`; chi_square
    `u^2 - 1` (forward); neyman `1 / u - 1`; total_variation `|u - 1| / 2`. The evidence is not known: u is estimated by
    the self-normalised weights `K w_k / sum_j w_j`, so the K-draw divergence that is optimised, without bias, is one of
    the draws and smaller than the divergence itself.

    Source: Csiszar (1967); with self-normalised weights Wang, Liu, Liu (2018), arXiv:1810.11943.

    Example:
        >>> f_divergence(divergence="hellinger").draws
        16
    """

    verbs = frozenset({"joint"})
    separate = True
    globals = False
    least_draws = 2
    bias = "the evidence in the weights is estimated by the same K draws: the divergence is biased by O(1 / K)"
    at_posterior = (-1.0, 0.0)

    draws: int = Field(default=16, ge=1)
    divergence: Name = "chi_square"

    def smooth(self) -> bool:
        return self.divergence != "total_variation"

    def __call__(self, d: Draws) -> Loss:
        f = DIVERGENCES[self.divergence]

        def divergence(log_w: Array, axis: int) -> Array:
            xp = ops.xp(log_w)
            log_u = log_w - xp.expand_dims(log_mean_exp(log_w, axis), axis=axis)
            return xp.mean(f(log_u), axis=axis)

        return Loss(-d.total(d.joint(log_mean_exp, d.log_w)), d.total(d.joint(divergence, d.log_w)))


def _kl_reverse(log_u: Array) -> Array:
    return -log_u


def _kl_forward(log_u: Array) -> Array:
    return ops.xp(log_u).exp(log_u) * log_u


def _jeffreys(log_u: Array) -> Array:
    return (ops.xp(log_u).exp(log_u) - 1.0) * log_u


def _jensen_shannon(log_u: Array) -> Array:
    xp = ops.xp(log_u)
    u = xp.exp(log_u)
    return 0.5 * (u * log_u - (1.0 + u) * xp.log((1.0 + u) / 2.0))


def _hellinger(log_u: Array) -> Array:
    return (ops.xp(log_u).exp(0.5 * log_u) - 1.0) ** 2


def _chi_square(log_u: Array) -> Array:
    return ops.xp(log_u).exp(2.0 * log_u) - 1.0


def _neyman(log_u: Array) -> Array:
    return ops.xp(log_u).exp(-log_u) - 1.0


def _total_variation(log_u: Array) -> Array:
    xp = ops.xp(log_u)
    return 0.5 * xp.abs(xp.exp(log_u) - 1.0)


DIVERGENCES: dict[str, Callable[[Array], Array]] = {
    "kl_reverse": _kl_reverse,
    "kl_forward": _kl_forward,
    "jeffreys": _jeffreys,
    "jensen_shannon": _jensen_shannon,
    "hellinger": _hellinger,
    "chi_square": _chi_square,
    "neyman": _neyman,
    "total_variation": _total_variation,
}
