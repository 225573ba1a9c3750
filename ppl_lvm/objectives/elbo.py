"""The evidence lower bound."""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from ppl_lvm import ops
from ppl_lvm.algorithm import BySite, Number, Objective, best_pattern
from ppl_lvm.draws import Draws, Loss, Site, times, trailing
from ppl_lvm.ops import Array


class elbo(Objective):
    """`E_q[ log p(x | z) + beta (log p(z) - log q(z | x)) ]`, in nats summed over all N rows.

    With `kl = "closed_form"` the second term is `-beta KL(q(z | x) || p(z))` in closed form at every latent site, which
    is refused where a prior's parents depend on the site through the guide; `"where_known"` takes it at the sites that
    have one and samples the others. `beta` may be a schedule. Score-type sites are credited only with the terms
    downstream of them, element by element inside plates.

    `weights = { "z*" = 0.5, x = 2.0 }` multiplies the term of a site (its log likelihood, or its part of the KL).
    `free_bits = f` counts a local site's KL as `max(f, mean over the batch's rows)`, in nats per row, so that a KL
    below f has no gradient; where it is sampled, the comparison is of estimates. With any of these the value is no
    bound. A site that only the model has and that is summed out has no term: its sum is the term of the site that looks
    at it.

    Source: Jordan, Ghahramani, Jaakkola, Saul (1999); Kingma and Welling (2013), arXiv:1312.6114; beta: Higgins et al.
    (2017); free bits: Kingma, Salimans, Jozefowicz, Chen, Sutskever, Welling (2016), arXiv:1606.04934.

    Example:
        >>> elbo(beta=4.0, kl="closed_form").requests()
        frozenset({'kl'})
        >>> elbo(weights={"z*": 0.5}).weight("z1")
        0.5
    """

    verbs = frozenset({"mean"})
    user_scale = True

    beta: Number = Field(default=1.0)
    kl: Literal["sampled", "closed_form", "where_known"] = "sampled"
    weights: BySite = ()
    free_bits: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)

    def requests(self) -> frozenset[str]:
        return frozenset({"sampled": (), "closed_form": ("kl",), "where_known": ("kl where known",)}[self.kl])

    def alike(self, roles: Mapping[str, str]) -> bool:
        """One weight, and beta and free bits for all of them or for none."""
        apart = self.beta != 1.0 and len(set(roles.values())) > 1
        return len({self.weight(name) for name in roles}) == 1 and not apart and not (
            self.free_bits and "latent" in roles.values()
        )

    def why_biased(self) -> str:
        return "free bits are compared with an estimate of the KL" if self.free_bits else ""

    def weight(self, site: str) -> float:
        """What the term of a site is multiplied by."""
        weights = dict(self.weights)
        pattern = best_pattern(weights, site)
        return 1.0 if pattern is None else weights[pattern]

    def __call__(self, d: Draws) -> Loss:
        terms = {name: self._term(d, s) for name, s in d.sites.items() if s.local}
        rows = self._with_free_bits(d, terms) if self.free_bits else d.mean(cost=terms)
        globals_ = [self._term(d, s) for s in d.sites.values() if not s.local]
        return Loss(-d.total(rows, sum(globals_[1:], globals_[0]) if globals_ else None))

    def _with_free_bits(self, d: Draws, terms: dict[str, Array]) -> Array:
        latent = {n: t for n, t in terms.items() if d.sites[n].role == "latent"}
        others = {n: t for n, t in terms.items() if n not in latent}
        rows = d.mean(cost=others) if others else 0.0 * d.mean(cost=latent)
        for name, term in latent.items():
            kl = -d.mean(cost={name: term})
            xp = ops.xp(kl)
            mean = xp.mean(kl, axis=1, keepdims=True)
            least = self.free_bits * self.weight(name)
            rows = rows - xp.where(mean > least, mean, 0.0 * mean + least)
        return rows

    def _term(self, d: Draws, site: Site) -> Array:
        """What one site adds; scale handlers of the program multiply the densities of their side."""
        weight, scale = self.weight((*site.joint, site.name)[0]), site.user_scale
        log_p, log_q = d.terms(site)
        if log_p is not None:
            log_p = times(weight, times(trailing(scale, log_p), log_p))
        if site.role == "observed":
            return log_p
        # In a step beta is an array, as a schedule may move it.
        beta: Array = self.beta
        if "kl" in site.extra:
            return -beta * weight * scale * site.extra["kl"]
        if log_q is not None:
            log_q = times(weight, times(trailing(site.guide_scale, log_q), log_q))
        if log_p is None:
            return -beta * log_q
        return beta * (log_p if log_q is None else log_p - log_q)
