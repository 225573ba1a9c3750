"""The score-function gradient with relaxed values and a learned network as its control variate."""

import math
from typing import Any, Literal

import numpy as np
from pydantic import Field

from ppl_lvm import ops
from ppl_lvm.algorithm import CREDITED, Estimator, SiteDistribution, Variant
from ppl_lvm.ops import Array
from ppl_lvm.relaxations import controlled, linear_density


class relax(Estimator):
    """`[h(D) - c(s')] grad log q(D) + grad c(s) - grad c(s')` with `c(s) = eta h(s) + w . tanh(u + s U + x X)`.

    D, s and s' are those of `rebar`, and so is what it asks of the program; the network of `hidden` units looks at the
    relaxed classes and at the rows x, without a program evaluation. Of a site in plates inside a row it looks at one
    element at a time, and is summed. Unbiased whatever c is: eta, the temperature and the network are trained so that
    the guide's gradient varies least; `temperature` and `eta` are where they start, and the network starts at zero.

    Source: Grathwohl, Choi, Wu, Roeder, Duvenaud (2018), arXiv:1711.00123.

    Example:
        >>> own = relax(hidden=4).initial_own(3, weights=10)
        >>> {n: np.shape(v) for n, v in own.items()}
        {'log_temperature': (1,), 'log_eta': (1,), 'w': (4,), 'u': (4,), 'U': (10, 4), 'X': (3, 4)}
    """

    site = "one_hot"
    by_row = True
    relaxes = True
    least_variance = True
    refuses = CREDITED

    temperature: float = Field(default=0.5, gt=0.0, allow_inf_nan=False)
    eta: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    hidden: int = Field(default=16, ge=1)

    def count(self, support: int) -> int:
        return 3

    def initial_own(self, features: int, weights: int = 0) -> dict[str, Any]:
        # Units must differ to learn different things.
        rng = np.random.default_rng(0)
        of_classes, of_rows = (rng.normal(size=(n, self.hidden)) / math.sqrt(max(n, 1)) for n in (weights, features))
        nothing = [0.0] * self.hidden
        return {
            "log_temperature": [math.log(self.temperature)],
            "log_eta": [math.log(self.eta)],
            **{"w": nothing, "u": nothing, "U": of_classes.tolist(), "X": of_rows.tolist()},
        }

    def variants(self, dist: SiteDistribution, index: Array) -> Variant:
        own = dist.own
        xp = ops.xp(own["w"])

        def critic(weights: Array) -> Array:
            """`[*batch, *elements, V] -> [*batch]`."""
            batch = dist.log_prob(dist.embed(weights)).ndim
            flat = xp.reshape(weights, tuple(weights.shape[:batch]) + (-1,))
            rows = xp.astype(dist.rows(), flat.dtype)
            units = own["u"] + xp.matmul(flat, own["U"]) + xp.matmul(rows, own["X"])
            return xp.sum(own["w"] * xp.tanh(units), axis=-1)

        temperature, eta = (xp.exp(own[n][0]) for n in ("log_temperature", "log_eta"))
        return controlled(dist, index, temperature, eta, critic)

    def log_density(self, log_probs: Array, weights: Array, side: Literal["guide", "model"]) -> Array:
        return linear_density(log_probs, weights)
