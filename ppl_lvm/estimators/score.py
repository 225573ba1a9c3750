"""The score-function gradient (REINFORCE)."""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from pydantic import Field

from ppl_lvm import ops
from ppl_lvm.algorithm import Estimator, Signal, SiteDistribution
from ppl_lvm.ops import Array, stop_gradient


class score(Estimator):
    """`sum_k (h_k - b) grad log q(z_k)`: any site, unbiased, noisy.

    `baseline = "moving_average"` takes off a running mean of the signal, `b <- decay b + (1 - decay) mean h`.
    Baselines that look at the rows are learned by least squares (NVIL): `"linear"` is `b = a + x . v`, `"network"`
    `b = a + w . tanh(u + x U)` with `hidden` units. None of them changes the expectation.

    Source: Williams (1992); Mnih and Gregor (2014), arXiv:1402.0030.

    Example:
        >>> score(baseline="moving_average").initial_state()
        0.0
        >>> {n: np.shape(v) for n, v in score(baseline="network", hidden=3).initial_own(2).items()}
        {'a': (1,), 'w': (3,), 'u': (3,), 'U': (2, 3)}
    """

    scored = True

    baseline: Literal["none", "moving_average", "linear", "network"] = "none"
    decay: float = Field(default=0.9, ge=0.0, lt=1.0)
    hidden: int = Field(default=32, ge=1)

    def sample(self, dist: SiteDistribution) -> Array:
        return dist.sample()

    def baseline_for(
        self, signal: Signal, own: Mapping[str, Array], state: Array | None
    ) -> Array | float:
        if state is not None:
            return state
        if own:
            # A global site's signal has one entry for the whole batch, so it sees the batch's mean row.
            rows, batch = signal.h.shape[2], signal.batch
            assert batch is not None
            xp = ops.xp(signal.h)
            x = xp.reshape(batch, (batch.shape[0], -1))
            x = x if rows == x.shape[0] else xp.mean(x, axis=0, keepdims=True)
            found = own["a"] + self._of_rows(x, own)
            return xp.reshape(found, (1, 1, -1) + (1,) * (signal.h.ndim - 3))
        return 0.0

    def _of_rows(self, x: Array, own: Mapping[str, Array]) -> Array:
        """`[B, features] -> [B]`."""
        xp = ops.xp(x)
        if self.baseline == "linear":
            return xp.sum(x * own["v"], axis=1)
        return xp.sum(own["w"] * xp.tanh(own["u"] + xp.matmul(x, own["U"])), axis=1)

    def initial_state(self) -> float | None:
        return 0.0 if self.baseline == "moving_average" else None

    def update(self, state: Array, signal: Signal) -> Array:
        return stop_gradient(self.decay * state + (1.0 - self.decay) * ops.xp(signal.value).mean(signal.value))

    def initial_own(self, features: int, weights: int = 0) -> dict[str, Any]:
        if self.baseline == "linear":
            return {"a": [0.0], "v": [0.0] * features}
        if self.baseline == "network":
            # Units must differ to learn different things; the output is zero as for the other baselines.
            start = np.random.default_rng(0).normal(size=(features, self.hidden)) / np.sqrt(max(features, 1))
            return {"a": [0.0], "w": [0.0] * self.hidden, "u": [0.0] * self.hidden, "U": start.tolist()}
        return {}
