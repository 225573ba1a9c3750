"""The objective of InfoVAE: an ELBO whose codes, taken together, are to look like the prior."""

from collections.abc import Mapping
from typing import Literal

from ppl_lvm import ops
from ppl_lvm.algorithm import NonNegative, Number, Objective, OptionalPositive
from ppl_lvm.draws import Draws, Loss
from ppl_lvm.ops import Array


class infovae(Objective):
    """`E_q log p(x | z) - (1 - alpha) KL(q(z | x) || p(z)) - (alpha + lam - 1) MMD^2(q(z), p(z))` per row.

    `q(z)` is the mean of `q(z | x)` over rows. `MMD^2 = E k(z, z') - 2 E k(z, w) + E k(w, w')` is estimated from the
    draws z_1 .. z_B of a batch's rows and as many draws w of the prior, without the terms i = j, so that its mean is
    zero where the two distributions are equal; it is one number for a batch and enters the loss N times. The kernel is
    `exp(-|z - w|^2 / b)` ("rbf") or `b / (b + |z - w|^2)` ("imq", inverse multiquadric), with `b = 2 D` unless
    `bandwidth` is given: the mean of `|w - w'|^2` where the prior is standard normal in D dimensions. All latents of a
    row are one vector. The KL is in closed form where it is known.

    `alpha = 1` drops the KL (MMD-VAE), `alpha = 0` with `lam = 1` is the ELBO. It is a lower bound on log p(x) where
    `alpha <= 0` and `alpha + lam >= 1`, but for the noise of the MMD, which may be negative; compare fits by their
    ELBO. A batch of few rows hardly sees a difference of two distributions.

    Source: Zhao, Song, Ermon (2017), arXiv:1706.02262; MMD: Gretton, Borgwardt, Rasch, Schölkopf, Smola (2012).

    Example:
        >>> infovae(alpha=0.0, lam=20.0).kernel
        'imq'
    """

    verbs = frozenset({"mean", "pooled"})
    globals = False
    at_posterior = (None, None)

    alpha: Number = 0.5
    lam: NonNegative = 10.0
    kernel: Literal["imq", "rbf"] = "imq"
    bandwidth: OptionalPositive = None

    def requests(self) -> frozenset[str]:
        return frozenset({"prior", "values", "kl where known"})

    def alike(self, roles: Mapping[str, str]) -> bool:
        return len(set(roles.values())) == 1

    def __call__(self, d: Draws) -> Loss:
        alpha: Array = self.alpha
        lam: Array = self.lam
        terms = {n: s.log_p if s.role == "observed" else (1.0 - alpha) * d.kl_term(s) for n, s in d.sites.items()}
        rows = d.mean(cost=terms)
        if d.B > 1:  # what is left over of rows that are held out may be one
            rows = rows - (alpha + lam - 1.0) * d.pooled(self._mmd(d))[:, None]
        return Loss(-d.total(rows))

    def _mmd(self, d: Draws) -> Array:
        """The squared discrepancy of a batch's draws, `[M, K]`."""
        latent = [s for s in d.sites.values() if "prior" in s.extra]
        z, w = _vectors([s.value for s in latent]), _vectors([s.extra["prior"] for s in latent])
        xp = ops.xp(z)
        b: Array = 2.0 * z.shape[-1] if self.bandwidth is None else self.bandwidth

        def k(x: Array, y: Array) -> Array:
            square = xp.sum((x[:, :, :, None] - y[:, :, None]) ** 2, axis=-1)
            return xp.exp(-square / b) if self.kernel == "rbf" else b / (b + square)

        def total(x: Array) -> Array:
            return xp.sum(x, axis=(2, 3))

        # On the diagonal a kernel is one.
        pairs = total(k(z, z)) + total(k(w, w)) - 2.0 * d.B
        return pairs / (d.B * (d.B - 1)) - 2.0 * total(k(z, w)) / d.B**2


def _vectors(values: list[Array]) -> Array:
    """`[M, K, B, ...]` of every site as one `[M, K, B, D]`."""
    xp = ops.xp(values[0])
    return xp.concat([xp.reshape(v, (*v.shape[:3], -1)) for v in values], axis=-1)
