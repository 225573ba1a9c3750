"""Between the ELBO and the importance-weighted bound."""

from pydantic import Field

from ppl_lvm.algorithm import NonNegative, Objective
from ppl_lvm.draws import Draws, Loss
from ppl_lvm.ops import Array, log_mean_exp


class ciwae(Objective):
    """`beta E log w + (1 - beta) E log mean_k w_k` per row, on the same draws; `beta` from 0 to 1 may be a schedule.

    Source: Rainforth, Kosiorek, Le, Maddison, Igl, Wood, Teh (2018), arXiv:1802.04537.

    Example:
        >>> ciwae(draws=8, beta=0.2).beta
        0.2
    """

    verbs = frozenset({"mean", "joint"})

    draws: int = Field(default=8, ge=1)
    beta: NonNegative = 0.5

    def __call__(self, d: Draws) -> Loss:
        # In a step beta is an array, as a schedule may move it.
        beta: Array = self.beta
        return Loss(-d.total(beta * d.mean(d.log_w) + (1.0 - beta) * d.joint(log_mean_exp, d.log_w)))
