"""The score-function gradient with relaxed values as its control variate."""

import math
from typing import Any, Literal, Self

from pydantic import model_validator

from ppl_lvm import ops
from ppl_lvm.algorithm import CREDITED, Estimator, Positive, Schedule, SiteDistribution, Variant
from ppl_lvm.ops import Array
from ppl_lvm.relaxations import controlled, linear_density


class rebar(Estimator):
    """`[h(D) - eta h(s')] grad log q(D) + eta grad h(s) - eta grad h(s')`, D hard, s and s' relaxed, s' given D.

    `s = softmax(z / temperature)` of Gumbel-perturbed log probabilities z, whose largest entry is D, and s' the same of
    z' drawn given D. Both come from the same noise, so that they have one value and two gradients. Three program
    evaluations a draw: at soft values the densities are those of hard ones, continued linearly, and the program must
    take them. Only the guide sees those, the model's gradient is that of hard draws. Inside a function of all draws,
    entry k is replaced by each value in turn. Unbiased for means and functions of all draws, whatever `eta` and
    `temperature` are; with `learn` these are where they start, and are trained so that the guide's gradient varies
    least, for a second pass through the gradient.

    Source: Tucker, Mnih, Maddison, Lawson, Sohl-Dickstein (2017), arXiv:1703.07370.

    Example:
        >>> rebar(temperature=0.5).initial_own(0)
        {'log_temperature': [-0.6931471805599453], 'log_eta': [0.0]}
        >>> rebar(learn=False).initial_own(0)
        {}
    """

    site = "one_hot"
    by_row = True
    relaxes = True
    least_variance = True
    refuses = CREDITED

    temperature: Positive = 0.5
    eta: Positive = 1.0
    learn: bool = True

    @model_validator(mode="after")
    def _what_is_learned_has_no_schedule(self) -> Self:
        scheduled = [n for n in ("temperature", "eta") if isinstance(getattr(self, n), Schedule)]
        if self.learn and scheduled:
            raise ValueError(f"{scheduled[0]} has a schedule and is learned; set learn = false")
        return self

    def count(self, support: int) -> int:
        return 3

    def initial_own(self, features: int, weights: int = 0) -> dict[str, Any]:
        if not self.learn:
            return {}
        assert isinstance(self.temperature, float) and isinstance(self.eta, float)
        return {"log_temperature": [math.log(self.temperature)], "log_eta": [math.log(self.eta)]}

    def variants(self, dist: SiteDistribution, index: Array) -> Variant:
        temperature: Any = self.temperature
        eta: Any = self.eta
        if dist.own:
            logs = dist.own["log_temperature"][0], dist.own["log_eta"][0]
            temperature, eta = (ops.xp(log).exp(log) for log in logs)
        return controlled(dist, index, temperature, eta)

    def log_density(self, log_probs: Array, weights: Array, side: Literal["guide", "model"]) -> Array:
        return linear_density(log_probs, weights)
