"""Variational importance sampling with the ELBO's guide."""

from pydantic import Field

from ppl_lvm.algorithm import Objective
from ppl_lvm.draws import Draws, Loss


class vbis(Objective):
    """Model: `-log mean_k w_k`, the importance-sampled log likelihood. Guide: the ELBO, per row.

    The guide's half of `vis` taken away: an ablation of it.

    Source: Li, Wang, Li, Wu (2024), arXiv:2311.02516; Su and Chen (2021), Variational Bayesian importance sampling.

    Example:
        >>> vbis(draws=100).draws
        100
    """

    verbs = frozenset({"mean", "log_mean_exp"})
    separate = True
    globals = False
    bias = "the model's gradient is that of the logarithm of a mean of K draws: self-normalised, bias O(1 / K)"
    at_posterior = (-1.0, -1.0)

    draws: int = Field(default=50, ge=1)

    def __call__(self, d: Draws) -> Loss:
        return Loss(-d.total(d.log_mean_exp(d.log_w)), -d.total(d.mean(d.log_w)))
