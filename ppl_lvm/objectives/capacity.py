"""The likelihood at a KL of given size: annealed capacities of a beta-VAE or a JointVAE."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from ppl_lvm import ops
from ppl_lvm.algorithm import BySite, NonNegative, Objective, best_pattern
from ppl_lvm.draws import Draws, Loss
from ppl_lvm.ops import Array

if TYPE_CHECKING:
    from ppl_lvm.backends.structure import Structure


class capacity(Objective):
    """`E_q log p(x | z) - gamma sum_c |KL_c - ramp C_c|` per row, in nats summed over all N rows.

    `capacity = { z = 10.0, c = 1.0 }` gives patterns of site names a number of nats C_c. `KL_c` is the KL of all sites
    whose most specific pattern it is, summed over them and averaged over the rows of the batch before the absolute
    value: `{ "*" = 25.0 }` is one capacity for all latents of a row, a name each is one for every site. A site without
    a pattern adds its KL with weight one. `ramp` multiplies all capacities: a schedule from 0 to 1 opens them step by
    step. `gamma` must be large beside the gain in likelihood that a nat of KL buys, or the KL stays below its capacity.

    The KL is in closed form and looks at no draw: guide and prior of a latent site look at no other latent site. A
    variable of V values holds log V nats over a uniform prior, so a larger capacity is refused, not cut off: it could
    never be met and its gradient would never stop. The value is no bound; compare fits by their ELBO.

    Source: Burgess, Higgins, Pal, Matthey, Watters, Desjardins, Lerchner (2018), arXiv:1804.03599; by site: Dupont
    (2018), Learning disentangled joint continuous and discrete representations, arXiv:1804.00104.

    Raises:
        LegalityError: a pattern matches no latent site of a row, or a capacity is more than its sites hold.

    Example:
        >>> capacity(capacity={"z": 10.0, "c*": 1.0}).pattern("c1")
        'c*'
    """

    verbs = frozenset({"mean"})
    globals = False
    bias = "the mean KL of a mini-batch stands for that of all rows inside an absolute value"
    at_posterior = (None, None)

    capacity: BySite = (("*", 0.5),)
    ramp: NonNegative = 1.0
    gamma: NonNegative = 10.0

    def requests(self) -> frozenset[str]:
        return frozenset({"kl without draws"})

    def alike(self, roles: Mapping[str, str]) -> bool:
        return len(set(roles.values())) == 1

    def pattern(self, site: str) -> str | None:
        """The pattern under whose capacity a site's KL counts."""
        return best_pattern(dict(self.capacity), site)

    def misfits(self, structure: "Structure") -> Iterable[str]:
        latent = {i.name: i for i in structure.drawn(local=True) if i.role == "latent"}
        for pattern, nats in self.capacity:
            sites = [i for n, i in latent.items() if self.pattern(n) == pattern]
            if not sites:
                yield (
                    f"capacity has an entry for {pattern!r}, under which no latent site of a row counts ({[*latent]}); "
                    f"name one, or leave it out."
                )
                continue
            most = [structure.most(i) for i in sites]
            known = sum(m for m in most if m is not None)
            if None not in most and nats > known:
                yield (
                    f"capacity gives {[i.name for i in sites]} {nats} nats, and their values hold {known:.4f} over a "
                    f"uniform prior (the sum of log V), so the KL could never meet it; lower it."
                )

    def __call__(self, d: Draws) -> Loss:
        gamma: Array = self.gamma
        ramp: Array = self.ramp
        terms = {n: s.log_p for n, s in d.sites.items() if s.role == "observed"}
        latent = [s for s in d.sites.values() if s.role == "latent" and "kl" in s.extra]
        free = [s.extra["kl"] for s in latent if self.pattern(s.name) is None]
        # Under names that are no site's: no draw is credited with what looks at none.
        rows = d.mean(cost={**terms, **{f"free {i}": -kl for i, kl in enumerate(free)}})
        for pattern, nats in self.capacity:
            parts = {f"kl {s.name}": s.extra["kl"] for s in latent if self.pattern(s.name) == pattern}
            kl = d.view(d.side).mean(cost=parts)
            xp = ops.xp(kl)
            rows = rows - gamma * xp.abs(xp.mean(kl, axis=1, keepdims=True) - ramp * nats)
        return Loss(-d.total(rows))
