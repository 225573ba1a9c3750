"""The thermodynamic variational objective."""

from itertools import pairwise

from pydantic import Field

from ppl_lvm.algorithm import Objective
from ppl_lvm.draws import Draws, Loss
from ppl_lvm.ops import Array, stop_gradient


class tvo(Objective):
    """`sum_i (b_{i+1} - b_i) E_{pi_i} log w` per row, `pi_b ~ q(z | x)^(1 - b) p(x, z)^b`: a left Riemann sum.

    The integral over b from 0 to 1 is log p(x), and the integrand rises with b, so the sum is a lower bound; with
    `partitions = 1` it is the ELBO. The first b is 0, the others are spaced evenly in log b from `smallest` to 1.
    Expectations under `pi_b` are self-normalised weights `w^b` of the K draws; the gradient is
    `E_pi grad f + Cov_pi(grad log pi, f)` at fixed draws, so it serves discrete and continuous sites alike.

    Source: Masrani, Le, Wood (2019), arXiv:1907.00031.

    Example:
        >>> tvo(draws=16, partitions=2, smallest=0.1).points()
        (0.0, 0.1, 1.0)
    """

    verbs = frozenset({"weighted"})
    detached = True
    globals = False
    least_draws = 2
    bias = "expectations under self-normalised weights of K draws: bias O(1 / K)"

    draws: int = Field(default=16, ge=1)
    partitions: int = Field(default=5, ge=1)
    smallest: float = Field(default=0.025, gt=0.0, lt=1.0)

    def points(self) -> tuple[float, ...]:
        """The partition of [0, 1], `partitions + 1` points."""
        inner = max(self.partitions - 1, 1)
        return (0.0, *(self.smallest ** ((inner - i) / inner) for i in range(self.partitions - 1)), 1.0)

    def __call__(self, d: Draws) -> Loss:
        points = self.points()
        rows = sum((b - a) * self._expectation(d, a) for a, b in pairwise(points))
        return Loss(-d.total(rows))

    def _expectation(self, d: Draws, b: float) -> Array:
        """`E_{pi_b} log w` with its gradient."""
        f, heat = d.log_w, b * d.log_w
        mean = d.weighted(heat, f)
        centred = stop_gradient(f - mean[:, None])
        density = b * d.log_p + (1.0 - b) * d.log_q
        covariance = d.weighted(heat, centred * density)
        return mean + covariance - stop_gradient(covariance)
