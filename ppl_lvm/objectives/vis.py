"""Variational importance sampling by the forward chi-square divergence."""

from pydantic import Field

from ppl_lvm.algorithm import Objective
from ppl_lvm.draws import Draws, Loss


class vis(Objective):
    """Model: `-log mean_k w_k`, the importance-sampled log likelihood. Guide: `log E_q w^2`, per row.

    `E_q w^2 = p(x)^2 (1 + chi^2(p(z | x) || q))`, so its minimum over guides is that of the forward chi-square
    divergence, and of the variance of the importance-sampled evidence: guides that cover the posterior. Logarithms of
    means, so gradients are self-normalised: biased by O(1 / K), better with many draws. Both losses share their draws.

    "auto" takes `dreg` or score-type estimators. `pathwise` is legal, and with few draws its gradient of `log E_q w^2`
    has been seen to diverge. `sequential = true` takes the guide's gradient at the model's new parameters, on the same
    draws, at twice the cost. Start wide: where q is narrow, few draws do not see what it misses.

    Source: Li, Wang, Li, Wu (2024), Forward chi^2 Divergence Based Variational Importance Sampling, arXiv:2311.02516.

    Example:
        >>> vis(draws=100).separate
        True
    """

    verbs = frozenset({"log_mean_exp"})
    separate = True
    globals = False
    prefers = ("dreg", "score")
    bias = "logarithms of means of K draws: self-normalised gradients, bias O(1 / K)"
    at_posterior = (-1.0, 2.0)

    draws: int = Field(default=50, ge=1)
    sequential: bool = False

    def model_first(self) -> bool:
        return self.sequential

    def __call__(self, d: Draws) -> Loss:
        return Loss(-d.total(d.log_mean_exp(d.log_w)), d.total(d.log_mean_exp(d.log_w, 2.0)))
