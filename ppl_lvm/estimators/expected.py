"""The mean of a site in the place of its draws."""

from ppl_lvm.algorithm import Estimator, SiteDistribution
from ppl_lvm.ops import Array


class expected(Estimator):
    """`E_q[z]` for a draw: exact, without noise, where the log joint density is linear in z.

    That is so of the parameters of conjugate models where they are drawn in their natural form: `log pi` of a
    `ppl.structured.LogDirichlet`, the form of a `ppl.structured.NormalInverseWishart`. The site's own density enters by
    its KL in closed form. `fit` refuses it before training where the densities of other sites are not linear in z, at
    the parameters and draws that a fit starts from. Values far from any draw, as the mean of forms, are met by
    densities that take what they are given (`ppl.structured.Gaussian`, `Labels`), not by ones that normalise it.

    Source: the mean-field updates of Johnson, Duvenaud, Wiltschko, Datta, Adams (2016), arXiv:1603.06277.

    Example:
        >>> expected().linear
        True
    """

    linear = True

    def sample(self, dist: SiteDistribution) -> Array:
        return dist.mean()
