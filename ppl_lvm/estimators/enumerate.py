"""Exact expectation over a finite site."""

from ppl_lvm.algorithm import Estimator, SiteDistribution, Variant
from ppl_lvm.ops import Array


class enumerate(Estimator):
    """`sum_v q(v) h(v)` over the whole support: no sampling noise, cost V program evaluations per draw.

    Legal where the expectation is of one draw (`mean`, and `log_mean_exp` with weight `log q`). Laid out as more draws
    of a joint function it would be another bound, so that is refused.

    Example:
        >>> enumerate().count(support=10)
        10
    """

    exhaustive = True
    site = "finite"
    refuses = {
        "joint": "its values are no draws: laid out as more of them the bound would be another one",
        "variance": "it has no detached draws",
    }

    def count(self, support: int) -> int:
        return support

    def variants(self, dist: SiteDistribution, index: Array) -> Variant:
        return Variant(dist.select(index))
