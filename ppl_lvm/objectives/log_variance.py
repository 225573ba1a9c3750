"""The log-variance divergence."""

from pydantic import Field

from ppl_lvm.algorithm import Objective
from ppl_lvm.draws import Draws, Loss


class log_variance(Objective):
    """Guide: `1/2 Var_k log w_k` over draws that carry no gradient, per row. Model: the ELBO.

    Zero at the exact posterior whatever the draws come from; at draws of the guide its gradient is the ELBO's, with a
    leave-one-out baseline. At draws from elsewhere (`off_policy`) it is another divergence with the same minimum.

    Source: Richter, Boustati, Nüsken, Ruiz, Akyildiz (2020), arXiv:2010.10436.

    Example:
        >>> log_variance(draws=8).detached
        True
    """

    verbs = frozenset({"mean", "variance"})
    detached = True
    separate = True
    globals = False
    least_draws = 2
    at_posterior = (-1.0, 0.0)

    draws: int = Field(default=8, ge=1)

    def __call__(self, d: Draws) -> Loss:
        return Loss(-d.total(d.mean(d.log_w)), d.total(0.5 * d.variance(d.log_w), 0.0 * d.log_w_global))
