"""Measure-valued gradients of finite sites."""

from ppl_lvm import ops
from ppl_lvm.algorithm import CREDITED, Estimator, SiteDistribution, Variant
from ppl_lvm.ops import Array, stop_gradient


class measure_valued(Estimator):
    """`sum_v h(v) grad q(v)` over the support, at the program's other draws of one draw: for a Bernoulli
    `(h(1) - h(0)) grad p`.

    One draw gives the value, the V values of the support the gradient: V + 1 program evaluations. Sites drawn before it
    are shared by all of them. Inside a function of all draws, entry k is replaced by each value in turn, the other
    draws as they are. Unbiased for means and functions of all draws.

    Source: Pflug (1996); Mohamed, Rosca, Figurnov, Mnih (2020), arXiv:1906.10652; with per-site strategies Lew, Huot,
    Staton, Mansinghka (2023), arXiv:2212.06386.

    Example:
        >>> measure_valued().count(support=2)
        3
    """

    site = "finite"
    refuses = CREDITED

    def count(self, support: int) -> int:
        return support + 1

    def variants(self, dist: SiteDistribution, index: Array) -> Variant:
        drawn = dist.sample()
        xp = ops.xp(drawn)
        first = 0 * index
        value = dist.select(xp.where(index > 0, index - 1, first))
        q = xp.exp(dist.log_prob(value))
        base = index == 0
        event = drawn.ndim - q.ndim
        wide = xp.reshape(base, tuple(base.shape) + (1,) * event)
        nothing = xp.zeros_like(q)
        return Variant(
            xp.where(wide, drawn, value),
            weight=xp.where(base, nothing + 1.0, nothing),
            credit=xp.where(base, nothing, q - stop_gradient(q)),
        )
