"""The objective of beta-TCVAE: the KL in three parts, each with a weight."""

from collections.abc import Mapping
from typing import Literal

from ppl_lvm import ops
from ppl_lvm.algorithm import NonNegative, Objective
from ppl_lvm.draws import Draws, Loss
from ppl_lvm.ops import Array


class tcvae(Objective):
    """`E_q log p(x | z) - alpha MI - beta TC - gamma DW` per row, in nats summed over all N rows.

    With `q(z) = mean_n q(z | x_n)` and its marginals `q(z_j)`, the mean KL over rows is the sum of
    MI `E log q(z | x) - log q(z)`, the information that codes have of rows; TC `E log q(z) - sum_j log q(z_j)`, the
    total correlation of the elements; and DW `E sum_j log q(z_j) - log p(z_j)`. All weights one is the ELBO.

    Of a batch of B rows, `q(z_i)` and each of its marginals is a sum over `q(z_i | x_j)` with weights that `aggregate`
    names. "stratified": `1 / N` for i itself and `(N - 1) / (N (B - 1))` for every other row. They sum to one, the
    estimate of q(z_i) is unbiased, and with all rows in the batch it is exact. (The published weights single out one
    other row; these are their mean over which one it is.) "weighted": `1 / (N B)` for every row, the importance weights
    of a batch; they sum to `1 / N`, so the logarithm is log N low at best, with the gradient of `mean_j q(z_i | x_j)`
    over the batch whatever N is. N is the number of all rows. The logarithm of either is too low on average, so MI is
    at most log B; hence gradients are biased unless alpha, beta and gamma are equal, when both cancel.

    Elements are those of all latent sites of a row: entries of a vector, variables of a code. Guide and prior look at
    no other latent site and have independent elements. The densities take `K B^2 D` numbers. The value is no bound
    where weights differ; compare fits by their ELBO.

    Source: Chen, Li, Grosse, Duvenaud (2018), arXiv:1802.04942.

    Example:
        >>> tcvae(beta=4.0).aggregate
        'stratified'
    """

    verbs = frozenset({"mean"})
    globals = False
    bias = "the logarithm of the codes' density is taken of an estimate from the rows of a mini-batch"
    at_posterior = (None, None)

    alpha: NonNegative = 1.0
    beta: NonNegative = 6.0
    gamma: NonNegative = 1.0
    aggregate: Literal["stratified", "weighted"] = "stratified"

    def requests(self) -> frozenset[str]:
        return frozenset({"cross"})

    def why_biased(self) -> str:
        return "" if self.alpha == self.beta == self.gamma else self.bias

    def alike(self, roles: Mapping[str, str]) -> bool:
        return len(set(roles.values())) == 1

    def __call__(self, d: Draws) -> Loss:
        alpha: Array = self.alpha
        beta: Array = self.beta
        gamma: Array = self.gamma
        crossed = {n: s.extra["cross"] for n, s in d.sites.items() if "cross" in s.extra}  # [M, K, B, B, D]
        like = next(iter(crossed.values()))
        xp, log_weights = ops.xp(like), self.log_weights(d, like)
        joint = ops.logsumexp(sum(xp.sum(c, axis=-1) for c in crossed.values()) + log_weights, 3)
        costs = {"*": (alpha - beta) * joint}
        for name, site in d.sites.items():
            if name not in crossed:
                costs[name] = site.log_p
                continue
            marginals = xp.sum(ops.logsumexp(crossed[name] + log_weights[..., None], 3), axis=-1)
            costs[name] = gamma * site.log_p - alpha * d.density(site) + (beta - gamma) * marginals
        return Loss(-d.total(d.mean(cost=costs)))

    def log_weights(self, d: Draws, like: Array) -> Array:
        """Of `q(z_i | x_j)` in `q(z_i)`, `[B, B]`."""
        xp = ops.xp(like)
        zero = ops.zeros((d.B, d.B), like)
        if self.aggregate == "weighted":
            return zero - xp.log(zero + d.N * d.B)
        if d.B == 1:  # what is left over of rows that are held out
            return zero
        own = ops.eye(d.B, like) > 0
        return xp.where(own, -xp.log(zero + d.N), xp.log((zero + d.N - 1.0) / (zero + d.N * (d.B - 1))))
