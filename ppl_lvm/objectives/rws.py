"""Reweighted wake-sleep."""

from pydantic import Field

from ppl_lvm.algorithm import Objective
from ppl_lvm.draws import Draws, Loss


class rws(Objective):
    """Model: `-log mean_k w_k`. Guide: `-(1 - sleep) sum_k v_k log q(z_k | x) - sleep E_p(z, x) log q(z | x)`, per row.

    `v` are the self-normalised weights: the wake phase minimises KL(p(z | x) || q) at the data, the sleep phase at data
    that the model draws, one for each row of a batch. Draws carry no gradient, so discrete and continuous sites are
    served alike; `dreg` gives the wake phase's gradient its doubly reparameterised form.

    Source: Bornschein and Bengio (2014), arXiv:1406.2751; Le, Kosiorek, Siddharth, Teh, Wood (2018), arXiv:1805.10469;
    doubly reparameterised: Tucker, Lawson, Gu, Maddison (2018), arXiv:1810.04152.

    Example:
        >>> sorted(rws(sleep=0.5).requests())
        ['sleep']
    """

    verbs = frozenset({"log_mean_exp", "wake", "sleep"})
    detached = True
    separate = True
    globals = False
    bias = "expectations under self-normalised weights of K draws: bias O(1 / K)"

    draws: int = Field(default=10, ge=1)
    sleep: float = Field(default=0.0, ge=0.0, le=1.0)

    def requests(self) -> frozenset[str]:
        return frozenset({"sleep"} if self.sleep else ())

    def __call__(self, d: Draws) -> Loss:
        guide = -(1.0 - self.sleep) * d.total(d.wake(d.log_w), 0.0 * d.log_w_global)
        if self.sleep:
            guide = guide - self.sleep * d.sleep()
        return Loss(-d.total(d.log_mean_exp(d.log_w)), guide)
