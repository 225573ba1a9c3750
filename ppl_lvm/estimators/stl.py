"""Sticking the landing."""

from ppl_lvm.algorithm import Estimator, SiteDistribution
from ppl_lvm.ops import Array


class stl(Estimator):
    """`d log w / dz dz / dphi`: the reparameterisation gradient without the guide's own score, whose mean is zero.

    Its noise vanishes where the guide is the posterior. The guide's loss sees `log q` replayed under stopped
    parameters. Unbiased for a mean over draws only; inside functions of several draws `dreg` is what it grows into.

    Source: Roeder, Wu, Duvenaud (2017), arXiv:1703.09194.

    Example:
        >>> stl().frozen
        True
    """

    frozen = True
    site = "reparameterised"
    refuses = {
        "joint": "the guide's own score has no mean of zero, so leaving it out is biased (use 'dreg')",
        "log_mean_exp": "the guide's own score has no mean of zero, so leaving it out is biased (use 'dreg')",
        "wake": "the guide's score is all there is",
        "weighted": "the guide's score is all there is",
        "variance": "draws are fixed there",
        "squares": "draws are fixed there",
    }

    def sample(self, dist: SiteDistribution) -> Array:
        return dist.rsample()
