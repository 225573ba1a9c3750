"""Relaxed draws by Gumbel noise, and their straight-through form."""

import math
from typing import Literal

from ppl_lvm import ops
from ppl_lvm.algorithm import AT_FIXED_DRAWS, FAR_FROM_LINEAR, Estimator, OptionalPositive, Positive, SiteDistribution
from ppl_lvm.ops import Array, stop_gradient


class gumbel_softmax(Estimator):
    """`y = softmax((theta + G) / tau)` with Gumbel noise G: the reparameterisation gradient of a relaxed one-hot.

    With `hard = True` the program sees `onehot(argmax y) + y - sg(y)`, a draw of the site's own distribution. Otherwise
    it sees y, and the densities of the site are those of relaxed one-hots on both sides,

    `log p(y) = log (V-1)! + (V-1) log tau + sum_i (log pi_i - (tau+1) log y_i) - V log sum_i pi_i y_i^-tau`,

    the model's with `prior_temperature` (None: the same). The objective is then that of the relaxed program, whose
    gradient is unbiased; with a KL in closed form, which is that of the hard sites, it is no bound of anything. A fit
    reports the loss of hard draws beside it. Weights stay off the vertices: y_i is no less than the least normal
    number (of two classes, than the rounding of 1), and has no gradient below.

    Source: Jang, Gu, Poole (2017), arXiv:1611.01144; Maddison, Mnih, Teh (2017), arXiv:1611.00712.

    Example:
        >>> gumbel_softmax(temperature={"schedule": "exponential", "start": 1.0, "end": 0.5, "steps": 1000}).relaxed()
        True
        >>> gumbel_softmax(hard=True).why_biased()
        'the gradient is that of relaxed values'
    """

    site = "one_hot"

    temperature: Positive = 1.0
    hard: bool = False
    prior_temperature: OptionalPositive = None

    def why_biased(self) -> str:
        if self.hard:
            return "the gradient is that of relaxed values"
        return "values are relaxed, and so is the program that the objective is of (with a KL in closed form, of none)"

    def why_refused(self, verb: str) -> str | None:
        if verb == "log_mean_exp" and self.hard:
            return FAR_FROM_LINEAR
        return AT_FIXED_DRAWS.get(verb)

    def relaxed(self) -> bool:
        return not self.hard

    def sample(self, dist: SiteDistribution) -> Array:
        log_probs, u = dist.log_probs(), dist.uniform()
        xp = ops.xp(u)
        perturbed = log_probs - xp.log(-xp.log(u))
        log_y = ops.log_softmax(perturbed / self.temperature, -1)
        if self.hard:
            y = xp.exp(log_y)
            largest = ops.one_hot(xp.argmax(perturbed, axis=-1), y.shape[-1])
            return dist.embed(largest + (y - stop_gradient(y)))
        # Of two classes a program may see one, whose complement must not round to zero.
        about = xp.finfo(u.dtype)
        least = math.log(about.eps if u.shape[-1] == 2 else about.smallest_normal)
        most = math.log1p(-about.eps) if u.shape[-1] == 2 else 0.0
        return dist.embed(xp.exp(xp.clip(log_y, least, most)))

    def log_density(self, log_probs: Array, weights: Array, side: Literal["guide", "model"]) -> Array:
        given = self.temperature if side == "guide" else self.prior_temperature
        tau: Array = self.temperature if given is None else given
        V, xp = weights.shape[-1], ops.xp(weights)
        log_y = xp.log(weights)
        shape = math.lgamma(V) + (V - 1) * xp.log(xp.zeros_like(log_y[..., 0]) + tau)
        own = xp.sum(log_probs - (tau + 1.0) * log_y, axis=-1)
        return shape + own - V * ops.logsumexp(log_probs - tau * log_y, -1)
