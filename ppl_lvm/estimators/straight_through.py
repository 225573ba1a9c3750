"""The straight-through gradient."""

from ppl_lvm import ops
from ppl_lvm.algorithm import Estimator, Positive, SiteDistribution
from ppl_lvm.ops import Array, stop_gradient


class straight_through(Estimator):
    """`D + pi_tau - sg(pi_tau)` with `D ~ pi` and `pi_tau = softmax(theta / tau)`: a hard draw with its mean's gradient.

    Each element of a site is a one-hot or a Bernoulli (two classes, its value is the second weight). Exact at
    `temperature = 1` for what is linear in the value, as `log p` and `log q` of the site itself are; so the sampled KL
    of sites that do not look at one another has its exact gradient. The direct gradient of `log q`, of mean zero under
    a mean over draws, is kept. With a KL in closed form only the likelihood goes through the value.

    Source: Bengio, Leonard, Courville (2013), arXiv:1308.3432.

    Example:
        >>> straight_through(temperature=0.5).site
        'one_hot'
    """

    site = "one_hot"
    bias = "the gradient is that of a function linear in the value, which the objective is not"
    refuses = {
        "log_mean_exp": "a power of the weights is far from linear in the value",
        "weighted": "draws are fixed there",
        "wake": "draws are fixed there",
        "variance": "draws are fixed there",
        "squares": "draws are fixed there",
        "sleep": "draws are fixed there",
    }

    temperature: Positive = 1.0

    def sample(self, dist: SiteDistribution) -> Array:
        mean = ops.softmax(dist.log_probs() / self.temperature, -1)
        hard = dist.classes_of(dist.sample())
        return dist.embed(hard + (mean - stop_gradient(mean)))
