"""ReinMax: straight-through to second order."""

from ppl_lvm import ops
from ppl_lvm.algorithm import AT_FIXED_DRAWS, FAR_FROM_LINEAR, Estimator, Positive, SiteDistribution
from ppl_lvm.ops import Array, stop_gradient


class reinmax(Estimator):
    """A hard draw `D ~ pi` whose gradient is `2 J((pi_tau + D) / 2) g - J(pi) g / 2`, with `J(p) = diag(p) - p p^T`.

    g is the gradient at D, `pi_tau = softmax(theta / tau)`. At `temperature = 1` it is exact for what is quadratic in
    the value of one site (straight-through: linear), by Heun's rule in the place of Euler's. The temperature enters
    through pi_tau alone; above one it trades exactness for variance. Where sites look at one another's values, later
    ones see values that carry a gradient of the first order, so it is not exact. `log p` and `log q` are those of hard
    values, both live and linear, so that a sampled KL has its exact gradient; with one in closed form only the other
    terms go through the value.

    Source: Liu, Dong, Liu, Yu, Gao (2023), arXiv:2304.08612.

    Example:
        >>> reinmax(temperature=1.3).temperature
        1.3
    """

    site = "one_hot"
    bias = "the gradient is that of terms quadratic in the value"
    refuses = {"log_mean_exp": FAR_FROM_LINEAR, **AT_FIXED_DRAWS}

    temperature: Positive = 1.0

    def sample(self, dist: SiteDistribution) -> Array:
        hard, theta = dist.classes_of(dist.sample()), dist.log_probs()
        xp = ops.xp(theta)

        def moved(p: Array) -> Array:
            """A function of theta with the Jacobian J(p)."""
            p = stop_gradient(p)
            return p * (theta - xp.sum(p * theta, axis=-1, keepdims=True))

        middle = (ops.softmax(theta / self.temperature, -1) + hard) / 2.0
        step = 2.0 * moved(middle) - 0.5 * moved(xp.exp(theta))
        return dist.embed(hard + (step - stop_gradient(step)))
