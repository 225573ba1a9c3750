"""Straight-through Gumbel-softmax with its noise given the draw averaged out."""

from pydantic import Field

from ppl_lvm import ops
from ppl_lvm.algorithm import AT_FIXED_DRAWS, FAR_FROM_LINEAR, Estimator, Positive, SiteDistribution
from ppl_lvm.ops import Array, stop_gradient


class gumbel_rao(Estimator):
    """`D + s - sg(s)`, `D ~ pi`, `s = 1/S sum_j softmax((theta + G_j) / tau)` over Gumbel noise given that it drew D.

    Given D, the noise is free of it: with E_i exponential and normalised theta, `theta_i + G_i` is `-log E_D` at the
    class that was drawn and `-log(E_i / pi_i + E_D)` elsewhere. G is stopped. The mean of the gradient is that of
    `gumbel_softmax` with `hard = True`; its variance falls with `samples`, S, to that over D alone, and the program
    runs once whatever S. `log p` and `log q` are those of hard values, both live.

    Source: Paulus, Maddison, Krause (2021), arXiv:2010.04838.

    Example:
        >>> gumbel_rao(temperature=0.5, samples=100).samples
        100
    """

    site = "one_hot"
    bias = "the gradient is that of relaxed values"
    refuses = {"log_mean_exp": FAR_FROM_LINEAR, **AT_FIXED_DRAWS}

    temperature: Positive = 1.0
    samples: int = Field(default=10, ge=1)

    def sample(self, dist: SiteDistribution) -> Array:
        hard, log_probs = dist.classes_of(dist.sample()), dist.log_probs()
        u = dist.uniform(copies=self.samples)
        xp = ops.xp(u)
        log_e = xp.log(-xp.log(u))
        of_draw = xp.sum(hard * log_e, axis=-1, keepdims=True)
        perturbed = -xp.where(hard > 0, of_draw, xp.logaddexp(log_e - log_probs, of_draw))
        moved = stop_gradient(perturbed) + (log_probs - stop_gradient(log_probs))
        soft = xp.mean(ops.softmax(moved / self.temperature, -1), axis=0)
        return dist.embed(hard + (soft - stop_gradient(soft)))
