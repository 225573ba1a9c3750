"""The leave-one-out score-function gradient."""

from collections.abc import Mapping

from ppl_lvm.algorithm import Estimator, Signal, SiteDistribution
from ppl_lvm.ops import Array, leave_one_out_mean


class rloo(Estimator):
    """`sum_k (h_k - b_k) grad log q(z_k) / K` with `b_k` the mean of the other draws' h.

    Unbiased where the objective is a mean over draws. Local sites need K >= 2 draws, global ones M >= 2 outer draws.

    Source: Kool, van Hoof, Welling (2019), "Buy 4 REINFORCE samples, get a baseline for free!".

    Example:
        >>> rloo().least_draws
        2
    """

    scored = True
    least_draws = 2
    refuses = {
        "joint": "its baseline, the mean of the other draws' values, is no baseline for a function of all draws",
        "filtered": "the draws of a row meet, so that none of them can be left out",
    }

    def sample(self, dist: SiteDistribution) -> Array:
        return dist.sample()

    def baseline_for(
        self, signal: Signal, own: Mapping[str, Array], state: Array | None
    ) -> Array | float:
        return leave_one_out_mean(signal.h)
