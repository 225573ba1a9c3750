"""Leave-one-out baselines for multi-sample objectives."""

from collections.abc import Mapping

from ppl_lvm.algorithm import Estimator, Signal, SiteDistribution
from ppl_lvm.draws import replace_one_each
from ppl_lvm.ops import Array, leave_one_out_mean


class vimco(Estimator):
    """`sum_k (f(log_w) - f(log_w with entry k := mean of the others)) grad log q(z_k)`, for the objective's own f.

    Unbiased, and the baseline of choice inside importance-weighted bounds. Where the objective is a mean over draws
    it is `rloo`. Needs K >= 2.

    Source: Mnih and Rezende (2016), arXiv:1602.06725 (arithmetic mean of log weights).

    Example:
        >>> vimco().least_draws
        2
    """

    scored = True
    least_draws = 2
    refuses = {"filtered": "the draws of a row meet, so that none of them can be left out"}

    def sample(self, dist: SiteDistribution) -> Array:
        return dist.sample()

    def baseline_for(
        self, signal: Signal, own: Mapping[str, Array], state: Array | None
    ) -> Array | float:
        others = leave_one_out_mean(signal.h)
        return others if signal.f is None else signal.f(replace_one_each(signal.h, others), 1)
