"""The gradient of the log-variance divergence, for any mean over draws."""

from collections.abc import Mapping

from ppl_lvm.algorithm import Estimator, Signal, SiteDistribution
from ppl_lvm.ops import Array, leave_one_out_mean


class vargrad(Estimator):
    """`1/(K - 1) sum_k (h_k - mean_j h_j) grad log q(z_k)`, the covariance of signal and score over K draws.

    For the ELBO's whole log weight it is the gradient of `1/2 Var log w`. As
    `(h_k - mean_j h_j) K / (K - 1) = h_k - mean_{j != k} h_j`, it is `rloo` to the last digit; both names are in use.

    Source: Richter, Boustati, Nüsken, Ruiz, Akyildiz (2020), VarGrad, arXiv:2010.10436.

    Example:
        >>> vargrad().least_draws
        2
    """

    scored = True
    least_draws = 2
    refuses = {
        "joint": "its baseline, the mean of the draws' values, is no baseline for a function of all draws",
        "filtered": "the draws of a row meet, so that none of them can be left out",
    }

    def sample(self, dist: SiteDistribution) -> Array:
        return dist.sample()

    def baseline_for(self, signal: Signal, own: Mapping[str, Array], state: Array | None) -> Array | float:
        return leave_one_out_mean(signal.h)
