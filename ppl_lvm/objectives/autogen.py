"""The bound of AutoGen: a row is generated together with copies of it from the same latents."""

from collections.abc import Mapping

from ppl_lvm.algorithm import NonNegative, Objective
from ppl_lvm.draws import Draws, Loss
from ppl_lvm.ops import Array


class autogen(Objective):
    """`(1 + m) E_q log p(x | z) - KL(q(z | x) || p(z))` per row, in nats summed over all N rows.

    A lower bound on `log int p(z) p(x | z)^(1 + m) dz`, the log probability of a row and of m perfect reconstructions
    that share its z; `m`, which may be a schedule, is a weight against collapse. The KL is in closed form where it is
    known. The best guide is the tempered posterior `p(z) p(x | z)^(1 + m)`, narrower than the posterior: fit the guide
    once more by `elbo` with `freeze = ["model"]` before its spread is read or its draws become importance draws. The
    value bounds log p(x) where `p(x | z) <= 1`, as for discrete data. It is 1 + m times the ELBO with
    `beta = 1 / (1 + m)`, so gradients grow with m; m = 0 is the ELBO.

    Source: Mansbridge, Fierimonte, Feige, Barber (2018), arXiv:1806.04480.

    Example:
        >>> autogen(m=2.0).m
        2.0
    """

    verbs = frozenset({"mean"})
    globals = False
    at_posterior = (None, None)

    m: NonNegative = 1.0

    def requests(self) -> frozenset[str]:
        return frozenset({"kl where known"})

    def alike(self, roles: Mapping[str, str]) -> bool:
        return self.m == 0.0 or len(set(roles.values())) == 1

    def __call__(self, d: Draws) -> Loss:
        m: Array = self.m  # in a step an array, as a schedule may move it
        terms = {n: (1.0 + m) * s.log_p if s.role == "observed" else d.kl_term(s) for n, s in d.sites.items()}
        return Loss(-d.total(d.mean(cost=terms)))
