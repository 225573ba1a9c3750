"""Antithetic pairs of discrete draws."""

from ppl_lvm import ops
from ppl_lvm.algorithm import CREDITED, Estimator, SiteDistribution, Variant
from ppl_lvm.ops import Array, stop_gradient


class disarm(Estimator):
    """Two draws b and b' from the same uniforms u and 1 - u, and
    `1/2 (h(b) - h(b')) (-1)^b' 1[b != b'] sigmoid(|theta|)` for the logit theta of a Bernoulli.

    A site with V classes is V - 1 sticks: stick i says whether the class is i, given that it is none before; its logit
    is `theta_i = log pi_i - log sum_{j > i} pi_j`. The sticks behind the later one of the two classes change neither
    value, so their terms, of mean zero, are left out. All elements of a row are flipped together. Two program
    evaluations a draw; values are hard. Inside a function of all draws, entry k is replaced by either value, the other
    draws as they are. Unbiased for means and functions of all draws.

    Source: Dong, Mnih, Tucker (2020), DisARM, arXiv:2006.10680, and independently Yin, Ho, Yan, Qian, Zhou (2020); for
    classes DisARM-SB of Dong, Mnih, Tucker (2021), arXiv:2106.08056.

    Example:
        >>> disarm().count(support=10)
        2
    """

    site = "classes"
    by_row = True
    refuses = CREDITED

    def count(self, support: int) -> int:
        return 2

    def variants(self, dist: SiteDistribution, index: Array) -> Variant:
        log_pi = dist.log_probs()
        xp = ops.xp(log_pi)
        theta = _sticks(log_pi)
        p, u = _sigmoid(stop_gradient(theta)), dist.uniform()[..., :-1]
        one, other = (xp.astype(stick, log_pi.dtype) for stick in (u < p, 1.0 - u < p))
        before, before_ = (xp.cumulative_sum(b, axis=-1) - b for b in (one, other))
        seen = xp.astype((before < 0.5) | (before_ < 0.5), log_pi.dtype)
        weight = 0.5 * (one - other) * seen * _sigmoid(xp.abs(stop_gradient(theta)))
        value, value_ = (_class(b, before) for b, before in ((one, before), (other, before_)))
        first = index == 0
        batch = dist.log_prob(dist.embed(value)).ndim
        wide = xp.reshape(first, tuple(first.shape) + (1,) * (log_pi.ndim - batch))
        credit = xp.sum(weight * (theta - stop_gradient(theta)), axis=tuple(range(batch, log_pi.ndim)))
        return Variant(
            dist.embed(xp.where(wide, value, value_)),
            weight=0.5 * xp.ones_like(credit),
            credit=xp.where(first, credit, -credit),
        )


def _sticks(log_pi: Array) -> Array:
    """Logits of the sticks, `[.., V] -> [.., V - 1]`; beyond what the dtype can hold they stay, without gradient."""
    xp = ops.xp(log_pi)
    least = xp.finfo(log_pi.dtype).smallest_normal
    pi = xp.clip(xp.exp(log_pi), min=least)
    rest = xp.flip(xp.cumulative_sum(xp.flip(pi[..., 1:], axis=-1), axis=-1), axis=-1)
    return xp.log(pi[..., :-1]) - xp.log(rest)


def _sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + ops.xp(x).exp(-x))


def _class(sticks: Array, before: Array) -> Array:
    """The class of the first stick that is one, else the last, as a one-hot `[.., V]`."""
    xp = ops.xp(sticks)
    none = 1.0 - xp.clip(xp.sum(sticks, axis=-1, keepdims=True), max=1.0)
    return xp.concat([sticks * xp.astype(before < 0.5, sticks.dtype), none], axis=-1)
