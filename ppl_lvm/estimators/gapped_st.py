"""The gapped straight-through gradient."""

from pydantic import Field

from ppl_lvm import ops
from ppl_lvm.algorithm import AT_FIXED_DRAWS, FAR_FROM_LINEAR, Estimator, Positive, SiteDistribution
from ppl_lvm.ops import Array, stop_gradient


class gapped_st(Estimator):
    """`D + s - sg(s)` with `D ~ pi` and `s = softmax((theta + m1 + m2) / tau)`, theta moved so that D leads by `gap`:

    `m1 = (max theta - theta) D` lifts the class that was drawn to the top, and `m2 = -relu(theta + gap - max theta)
    (1 - D)` lowers those that are closer to it than `gap`; both carry no gradient. It stands for the Gumbel noise of
    straight-through Gumbel-softmax without its variance. `log p` and `log q` are those of hard values, both live.

    Source: Fan, Chi, Rudnicky, Ramadge (2022), arXiv:2206.07235.

    Example:
        >>> gapped_st(temperature=0.5).gap
        1.0
    """

    site = "one_hot"
    bias = "the gradient is that of values moved towards the draw"
    refuses = {"log_mean_exp": FAR_FROM_LINEAR, **AT_FIXED_DRAWS}

    temperature: Positive = 1.0
    gap: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)

    def sample(self, dist: SiteDistribution) -> Array:
        hard, theta = dist.classes_of(dist.sample()), dist.log_probs()
        xp = ops.xp(theta)
        top = xp.max(theta, axis=-1, keepdims=True)
        close = xp.clip(theta + self.gap - top, 0.0, None)
        moved = theta + stop_gradient(xp.where(hard > 0, top - theta, -close))
        soft = ops.softmax(moved / self.temperature, -1)
        return dist.embed(hard + (soft - stop_gradient(soft)))
