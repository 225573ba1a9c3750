"""The sandwich of the ELBO and the chi upper bound."""

from pydantic import Field

from ppl_lvm.algorithm import Objective
from ppl_lvm.draws import Draws, Loss


class chivi(Objective):
    """Model: the ELBO. Guide: `1/2 (log E_q w^2 - E_q log w)`, per row: the gap of an upper and a lower bound.

    The model's half of `vis` taken away: an ablation of it, and a guide between its own and the ELBO's.

    Source: Dieng, Tran, Ranganath, Paisley, Blei (2017), arXiv:1611.00328; in this form Li, Wang, Li, Wu (2024),
    arXiv:2311.02516.

    Example:
        >>> chivi(draws=100).draws
        100
    """

    verbs = frozenset({"mean", "log_mean_exp"})
    separate = True
    globals = False
    prefers = ("dreg", "score")
    bias = "the logarithm of a mean of K draws: self-normalised gradients, bias O(1 / K)"
    at_posterior = (-1.0, 0.5)

    draws: int = Field(default=50, ge=1)

    def __call__(self, d: Draws) -> Loss:
        elbo = d.mean(d.log_w)
        return Loss(-d.total(elbo), 0.5 * d.total(d.log_mean_exp(d.log_w, 2.0) - elbo, 0.0 * d.log_w_global))
