"""The score-function gradient (REINFORCE)."""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from ppl_lvm import ops
from ppl_lvm.algorithm import Estimator, Signal, SiteDistribution
from ppl_lvm.ops import Array, stop_gradient


class score(Estimator):
    """`sum_k (h_k - b) grad log q(z_k)`: any site, unbiased, noisy.

    `baseline = "moving_average"` takes off a running mean of the signal, `b <- decay b + (1 - decay) mean h`;
    `"linear"` learns `b = a + x . v` from the rows by least squares (NVIL's input-dependent baseline, linear). Both
    leave the expectation as it is.

    Source: Williams (1992); Mnih and Gregor (2014), arXiv:1402.0030.

    Example:
        >>> score(baseline="moving_average").initial_state()
        0.0
    """

    scored = True

    baseline: Literal["none", "moving_average", "linear"] = "none"
    decay: float = Field(default=0.9, ge=0.0, lt=1.0)

    def sample(self, dist: SiteDistribution) -> Array:
        return dist.sample()

    def baseline_for(
        self, signal: Signal, own: Mapping[str, Array], state: Array | None
    ) -> Array | float:
        if state is not None:
            return state
        if own:
            # A global site's signal has one entry for the whole batch, so it sees the batch's mean row.
            rows, batch = signal.h.shape[-1], signal.batch
            assert batch is not None
            xp = ops.xp(signal.h)
            x = xp.reshape(batch, (batch.shape[0], -1))
            x = x if rows == x.shape[0] else xp.mean(x, axis=0, keepdims=True)
            return own["a"] + xp.sum(x * own["v"], axis=1)[None, None]
        return 0.0

    def initial_state(self) -> float | None:
        return 0.0 if self.baseline == "moving_average" else None

    def update(self, state: Array, signal: Signal) -> Array:
        return stop_gradient(self.decay * state + (1.0 - self.decay) * ops.xp(signal.value).mean(signal.value))

    def initial_own(self, features: int) -> dict[str, list[float]]:
        return {"a": [0.0], "v": [0.0] * features} if self.baseline == "linear" else {}
