"""The reparameterisation gradient."""

from ppl_lvm.algorithm import Estimator, SiteDistribution
from ppl_lvm.ops import Array


class pathwise(Estimator):
    """`z = T(eps; phi)`: the gradient flows through the value, and through `log q` directly.

    Unbiased for every verb. Needs a distribution whose library draws reparameterised samples (explicit or implicit).

    Source: Kingma and Welling (2013), arXiv:1312.6114; Rezende, Mohamed, Wierstra (2014), arXiv:1401.4082.

    Example:
        >>> pathwise().site
        'reparameterised'
    """

    site = "reparameterised"

    def sample(self, dist: SiteDistribution) -> Array:
        return dist.rsample()
