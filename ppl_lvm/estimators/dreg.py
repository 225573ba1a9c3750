"""The doubly reparameterised gradient."""

from ppl_lvm.algorithm import Estimator, SiteDistribution
from ppl_lvm.ops import Array


class dreg(Estimator):
    """`sum_k (f'_k - f''_kk) d log_w_k / dz_k dz_k / dphi` for the objective's own f(log_w): for log-mean-exp `w_k^2`.

    The guide's loss sees `log q` replayed under stopped parameters, so no score of the guide is left in the gradient.
    In a mean over draws it is sticking the landing; of `log E w^n` it is `n (1 - n)` times the self-normalised weights,
    of a wake phase `w_k - w_k^2`. Every other local site of the row must be `dreg` too, or a score-type site that does
    not depend on one. Model and guide share no parameter.

    Source: Tucker, Lawson, Gu, Maddison (2018), arXiv:1810.04152; Roeder, Wu, Duvenaud (2017), arXiv:1703.09194.

    Example:
        >>> dreg().frozen
        True
    """

    frozen = True
    site = "reparameterised"
    refuses = {
        "weighted": "a gradient at fixed draws has no reparameterised form here",
        "variance": "a gradient at fixed draws has no reparameterised form here",
        "squares": "a gradient at fixed draws has no reparameterised form here",
    }

    def sample(self, dist: SiteDistribution) -> Array:
        return dist.rsample()
