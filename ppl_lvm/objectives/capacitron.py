"""The likelihood under a bound on the KL, whose multiplier is learned."""

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ppl_lvm import ops
from ppl_lvm.algorithm import BySite, Objective, best_pattern
from ppl_lvm.draws import Draws, Loss
from ppl_lvm.ops import Array, stop_gradient

if TYPE_CHECKING:
    from ppl_lvm.backends.structure import Structure


class capacitron(Objective):
    """`min max_{l >= 0} -E_q log p(x | z) + sum_c l_c (KL_c - C_c)` per row, in nats summed over all N rows.

    `capacity = { "*" = 20.0 }` gives patterns of site names a number of nats C_c that the mean KL over rows of their
    sites, summed, is not to exceed; since that KL is `I(x; z) + KL(q(z) || p(z))`, C bounds what the latents know of a
    row. Several patterns, as of a hierarchy, have a multiplier each. A site without one adds its KL with weight one.
    The multipliers `l = softplus(multiplier)` start at one, are constants to model and guide, and climb by the extra
    loss (`objective.multiplier`, of the guide's optimiser unless it has one of its own). Below its capacity a
    multiplier goes to zero and the KL stays where it is, unlike under `capacity`. Too fast they oscillate, too slow the
    KL drifts first. The KL is in closed form where it is known. The value is no bound; compare fits by their ELBO.

    Source: Battenberg, Mariooryad, Stanton, Skerry-Ryan, Shannon, Kao, Bagby (2019), arXiv:1906.03402.

    Raises:
        LegalityError: a pattern matches no latent site of a row.

    Example:
        >>> len(capacitron(capacity={"z1": 4.0, "z2": 9.0}).initial_own(3)["multiplier"])
        2
    """

    verbs = frozenset({"mean"})
    globals = False
    at_posterior = (None, None)

    capacity: BySite = (("*", 5.0),)

    def requests(self) -> frozenset[str]:
        return frozenset({"kl where known"})

    def alike(self, roles: Mapping[str, str]) -> bool:
        return len(set(roles.values())) == 1

    def initial_own(self, features: int) -> dict[str, Any]:
        return {"multiplier": [math.log(math.e - 1.0)] * len(self.capacity)}

    def pattern(self, site: str) -> str | None:
        """The pattern under whose capacity a site's KL counts."""
        return best_pattern(dict(self.capacity), site)

    def misfits(self, structure: "Structure") -> Iterable[str]:
        drawn = structure.drawn(local=True)
        latent = [i.name for i in drawn]
        if any(i.role == "auxiliary" for i in drawn) and len({self.pattern(n) for n in latent}) > 1:
            yield (
                f"The guide has auxiliary sites, whose densities make up one KL with those of the others ({latent}), "
                f"and capacity parts them; give all one pattern."
            )
        for pattern, _ in self.capacity:
            if all(self.pattern(n) != pattern for n in latent):
                yield (
                    f"capacity has an entry for {pattern!r}, under which no latent site of a row counts ({latent}); "
                    f"name one, or leave it out."
                )

    def __call__(self, d: Draws) -> Loss:
        raw = d.own["objective"]["multiplier"]
        xp = ops.xp(raw)
        multipliers = xp.logaddexp(raw, xp.zeros_like(raw))
        order = [pattern for pattern, _ in self.capacity]
        weights: dict[str | None, Array] = {p: stop_gradient(multipliers)[i] for i, p in enumerate(order)}
        terms = {n: s.log_p if s.role == "observed" else d.kl_term(s) for n, s in d.sites.items()}
        of = {n: None if d.sites[n].role == "observed" else self.pattern(n) for n in terms}
        rows = d.mean(cost={n: weights.get(of[n], 1.0) * term for n, term in terms.items()})
        excess = 0.0 * rows
        for i, (pattern, nats) in enumerate(self.capacity):
            rows = rows + weights[pattern] * nats
            # Of another view, as baselines learn from the signals of the loss itself.
            kl = -d.view(d.side).mean(cost={n: term for n, term in terms.items() if of[n] == pattern})
            excess = excess + multipliers[i] * stop_gradient(kl - nats)
        return Loss(-d.total(rows), extra=-d.total(excess))
