"""The objective of DIP-VAE: codes whose covariance over rows is to be the identity."""

from collections.abc import Mapping
from typing import Literal

from ppl_lvm import ops
from ppl_lvm.algorithm import NonNegative, Objective, OptionalNonNegative
from ppl_lvm.draws import Draws, Loss
from ppl_lvm.ops import Array


class dipvae(Objective):
    """`ELBO - off_diagonal sum_{i != j} C_ij^2 - diagonal sum_i (C_ii - 1)^2` per row.

    With mean and variance of the guide's distribution at a row, C is `Cov_n[mean_n]` (`covariance = "means"`,
    DIP-VAE-I) or `E_n[variance_n] + Cov_n[mean_n]` ("codes", DIP-VAE-II, the covariance of q(z)). I sees means alone
    and gives each of them variance one, unused ones too; under II an unused element fills its variance with noise.
    `diagonal` is by default 10 `off_diagonal` under I and `off_diagonal` under II. The penalty is one number for a
    batch and enters the loss N times; `Cov` of a batch of B of N rows is unbiased, `(1 - 1/N) / (B - 1)` times the sum
    of products, and exact with all rows in it. A batch should have many more rows than there are elements. The KL is in
    closed form where it is known. Guides look at no other latent site and have independent, continuous elements. The
    value is below the ELBO, and so a bound; compare fits by the ELBO itself.

    Source: Kumar, Sattigeri, Balakrishnan (2017), arXiv:1711.00848.

    Example:
        >>> dipvae(covariance="means").weights()
        (10.0, 100.0)
    """

    verbs = frozenset({"mean"})
    globals = False
    bias = "the covariance of a mini-batch is squared"
    at_posterior = (None, None)

    covariance: Literal["codes", "means"] = "codes"
    off_diagonal: NonNegative = 10.0
    diagonal: OptionalNonNegative = None

    def requests(self) -> frozenset[str]:
        return frozenset({"moments", "kl where known"})

    def alike(self, roles: Mapping[str, str]) -> bool:
        return True

    def weights(self) -> tuple[Array, Array]:
        """Of the elements off the diagonal and on it."""
        off: Array = self.off_diagonal
        return off, (10.0 * off if self.covariance == "means" else off) if self.diagonal is None else self.diagonal

    def __call__(self, d: Draws) -> Loss:
        terms = {n: s.log_p if s.role == "observed" else d.kl_term(s) for n, s in d.sites.items()}
        return Loss(-d.total(d.mean(cost=terms) - self._penalty(d)[:, None]))

    def _penalty(self, d: Draws) -> Array:
        """`[M]`."""
        latent = [s for s in d.sites.values() if "mean" in s.extra]
        xp = ops.xp(latent[0].extra["mean"])
        # The guide's parameters are the same in every draw, as they look at none.
        mean, variance = (xp.concat([s.extra[n][:, 0] for s in latent], axis=-1) for n in ("mean", "variance"))
        centred = mean - xp.mean(mean, axis=1, keepdims=True)
        products = xp.sum(centred[..., None] * centred[..., None, :], axis=1)
        C = products * (1.0 - 1.0 / d.N) / max(d.B - 1, 1)
        one = ops.eye(C.shape[-1], C)
        if self.covariance == "codes":
            C = C + one * xp.mean(variance, axis=1)[..., None]
        off, on = self.weights()
        return xp.sum((C - one) ** 2 * (off * (1.0 - one) + on * one), axis=(1, 2))
