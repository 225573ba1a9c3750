"""The evidence lower bound."""

from typing import Literal

from pydantic import Field

from ppl_lvm.algorithm import Number, Objective
from ppl_lvm.draws import Draws, Loss, Site
from ppl_lvm.ops import Array


class elbo(Objective):
    """`E_q[ log p(x | z) + beta (log p(z) - log q(z | x)) ]`, in nats summed over all N rows.

    With `kl = "closed_form"` the second term is `-beta KL(q(z | x) || p(z))` in closed form at every latent site, which
    is refused where a prior's parents depend on the site through the guide. `beta` may be a schedule. Score-type sites
    are credited only with the terms downstream of them.

    Source: Jordan, Ghahramani, Jaakkola, Saul (1999); Kingma and Welling (2013), arXiv:1312.6114; beta: Higgins et al.
    (2017).

    Example:
        >>> elbo(beta=4.0, kl="closed_form").requests()
        frozenset({'kl'})
    """

    verbs = frozenset({"mean"})
    user_scale = True

    beta: Number = Field(default=1.0)
    kl: Literal["sampled", "closed_form"] = "sampled"

    def requests(self) -> frozenset[str]:
        return frozenset({"kl"} if self.kl == "closed_form" else ())

    def __call__(self, d: Draws) -> Loss:
        rows = d.mean(cost={name: self._term(d, s) for name, s in d.sites.items() if s.local})
        globals_ = [self._term(d, s) for s in d.sites.values() if not s.local]
        return Loss(-d.total(rows, sum(globals_, 0.0 * d.log_w_global)))

    def _term(self, d: Draws, site: Site) -> Array:
        """What one site adds; scale handlers of the program multiply the densities of their side."""
        scale: Array = site.user_scale
        if site.role == "observed":
            return scale * site.log_p
        # In a step beta is an array, as a schedule may move it.
        beta: Array = self.beta
        if "kl" in site.extra:
            return -beta * scale * site.extra["kl"]
        log_p = 0.0 if site.log_p is None else scale * site.log_p
        log_q = 0.0 if site.log_q is None else site.guide_scale * d.density(site)
        return beta * (log_p - log_q)
