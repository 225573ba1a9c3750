"""The chi upper bound."""

from pydantic import Field

from ppl_lvm.algorithm import Objective, Positive
from ppl_lvm.draws import Draws, Loss


class cubo(Objective):
    """Guide: `1/n log E_q w^n`, an upper bound on log p(x) for n >= 1, minimised. Model: the ELBO, maximised.

    An upper bound is no objective for a model, which would lower it anywhere. Estimated by K draws, `log mean w^n / n`
    is below the bound in expectation, so what is reported is an upper bound in the limit of many draws only.

    Source: Dieng, Tran, Ranganath, Paisley, Blei (2017), arXiv:1611.00328.

    Example:
        >>> cubo(draws=50).n
        2.0
    """

    verbs = frozenset({"mean", "log_mean_exp"})
    separate = True
    globals = False
    prefers = ("dreg", "score")
    bias = "the logarithm of a mean of K draws: self-normalised gradients, bias O(1 / K)"
    at_posterior = (-1.0, 1.0)

    draws: int = Field(default=50, ge=1)
    n: Positive = 2.0

    def __call__(self, d: Draws) -> Loss:
        return Loss(-d.total(d.mean(d.log_w)), d.total(d.log_mean_exp(d.log_w, self.n) / self.n))
