"""Draws from elsewhere."""

from pydantic import Field

from ppl_lvm import ops
from ppl_lvm.algorithm import Estimator, SiteDistribution, Variant
from ppl_lvm.ops import Array, stop_gradient


class off_policy(Estimator):
    """`b(z) = (1 - epsilon) q(z) + epsilon / V`: uniform on the V values of the support with probability epsilon.

    Objectives at fixed draws (`trajectory_balance`, `log_variance`) take the draws as they are: guides that have lost a
    mode find it again. Elsewhere a draw is weighed by `q / b`, at most `1 / (1 - epsilon)`, which is unbiased for a
    mean over draws; its gradient is a score, `q / b h grad log q`.

    Source: exploration in Hu, Malkin, Jain, Everett, Graikos, Bengio (2023), GFlowNet-EM, arXiv:2302.06576.

    Example:
        >>> off_policy(epsilon=0.2).epsilon
        0.2
    """

    weighted = True
    site = "finite"
    refuses = {
        "joint": "its draws are not those of the guide, and with weights on draws the bound would be another one",
    }

    epsilon: float = Field(default=0.1, ge=0.0, lt=1.0)

    def variants(self, dist: SiteDistribution, index: Array) -> Variant:
        value, size = dist.explore(self.epsilon)
        log_q = dist.log_prob(value)
        xp = ops.xp(log_q)
        b = (1.0 - self.epsilon) * xp.exp(log_q) + self.epsilon / size
        return Variant(value, weight=xp.exp(log_q) / stop_gradient(b))
