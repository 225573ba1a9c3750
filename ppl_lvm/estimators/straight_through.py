"""The straight-through gradient."""

from ppl_lvm import ops
from ppl_lvm.algorithm import AT_FIXED_DRAWS, FAR_FROM_LINEAR, Estimator, Positive, SiteDistribution
from ppl_lvm.ops import Array, stop_gradient


class straight_through(Estimator):
    """`D + pi_tau - sg(pi_tau)`, `D ~ pi`, `pi_tau = softmax(theta / tau)`: a hard draw with its mean's gradient.

    Each element of a site is a one-hot or a Bernoulli (two classes, its value is the second weight). Exact at
    `temperature = 1` for what is linear in the value of every site, such as the site's own `log p` and `log q`: a
    sampled KL of sites that do not look at one another has its exact gradient. `log q` is live in its value and in its
    parameters; the direct part has mean zero under a mean over draws. With a KL in closed form only the other terms go
    through the value.

    Source: Bengio, Leonard, Courville (2013), arXiv:1308.3432.

    Example:
        >>> straight_through(temperature=0.5).site
        'one_hot'
    """

    site = "one_hot"
    bias = "straight-through gradients are those of terms linear in the value"
    refuses = {"log_mean_exp": FAR_FROM_LINEAR, **AT_FIXED_DRAWS}

    temperature: Positive = 1.0

    def sample(self, dist: SiteDistribution) -> Array:
        hard = dist.classes_of(dist.sample())
        mean = ops.softmax(dist.log_probs() / self.temperature, -1)
        return dist.embed(hard + (mean - stop_gradient(mean)))
