"""The importance-weighted bound."""

from ppl_lvm.algorithm import Objective
from ppl_lvm.draws import Draws, Loss
from ppl_lvm.ops import log_mean_exp


class iwae(Objective):
    """`E log (1/K) sum_k w_k` per row with `w = p(x, z) / q(z | x)`, in nats summed over all N rows.

    K (`draws`) importance draws per row stand inside the data plate; globals stay outside:
    `E_q(g)[ log p(g) - log q(g) + (N/B) sum_n log mean_k w_nk ]`. K = 1 is the ELBO.

    Source: Burda, Grosse, Salakhutdinov (2015), arXiv:1509.00519.

    Example:
        >>> iwae(draws=50).draws
        50
    """

    verbs = frozenset({"joint"})

    def __call__(self, d: Draws) -> Loss:
        return Loss(-d.total(d.joint(log_mean_exp, d.log_w)))
