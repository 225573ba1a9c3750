"""The wake-sleep algorithm."""

from ppl_lvm.algorithm import Objective
from ppl_lvm.draws import Draws, Loss


class wake_sleep(Objective):
    """Model (wake): `-E_q log p(x, z)` at the data. Guide (sleep): `-E_p(z, x) log q(z | x)` at the model's own draws.

    One latent and one row of data are drawn from the model for each row of a batch. Both are gradients of densities at
    fixed draws; they are not of one objective.

    Source: Hinton, Dayan, Frey, Neal (1995), Science 268; Dayan (2000).

    Example:
        >>> sorted(wake_sleep().requests())
        ['sleep']
    """

    verbs = frozenset({"mean", "sleep"})
    detached = True
    separate = True

    def requests(self) -> frozenset[str]:
        return frozenset({"sleep"})

    def __call__(self, d: Draws) -> Loss:
        return Loss(-d.total(d.mean(d.log_w)), -d.sleep())
