"""Exact expectation over a finite site."""

from ppl_lvm.algorithm import Estimator, SiteDistribution, Variant
from ppl_lvm.ops import Array


class enumerate(Estimator):
    """`sum_v q(v) h(v)` over the whole support: no sampling noise, cost V program evaluations per draw.

    In a function f of K draws the sum is over all choices of one value for each draw, `sum_v1..vK q(v1)..q(vK)
    f(log_w_1(v1), .., log_w_K(vK))`: V^K evaluations of f, none more of the program, up to 4,096.

    Example:
        >>> enumerate().count(support=10)
        10
    """

    exhaustive = True
    site = "finite"

    def count(self, support: int) -> int:
        return support

    def variants(self, dist: SiteDistribution, index: Array) -> Variant:
        return Variant(dist.select(index))
