"""Trajectory balance, the objective of generative flow networks."""

from typing import Any

from pydantic import Field

from ppl_lvm import ops
from ppl_lvm.algorithm import Objective
from ppl_lvm.draws import Draws, Loss
from ppl_lvm.ops import Array, stop_gradient


class trajectory_balance(Objective):
    """Guide: `E (log Z(x) + log q(z | x) - log p(x, z))^2` at fixed draws, per row. Model: `-E_q log p(x, z)`.

    The E step of GFlowNet-EM for a guide that draws its sites in a fixed order. `log Z(x) = a + x . v` is learned along
    (`objective.a`, `objective.v`, with the guide's optimiser unless it is given one), and near log p(x) in the end.
    Draws may come from elsewhere: `off_policy` explores, and the model's step weighs its draws back. `alternate` of the
    recipe makes blocks of E and M steps.

    Source: Malkin, Jain, Bengio, Sun, Bengio (2022), arXiv:2201.13259; Hu, Malkin, Jain, Everett, Graikos, Bengio
    (2023), GFlowNet-EM, arXiv:2302.06576.

    Example:
        >>> trajectory_balance().initial_own(2)
        {'a': [0.0], 'v': [0.0, 0.0]}
    """

    verbs = frozenset({"mean", "squares"})
    detached = True
    separate = True
    globals = False
    at_posterior = (-1.0, None)

    draws: int = Field(default=8, ge=1)

    def initial_own(self, features: int) -> dict[str, Any]:
        return {"a": [0.0], "v": [0.0] * features}

    def __call__(self, d: Draws) -> Loss:
        balance = self._log_evidence(d)[:, None] - d.log_w
        guide = d.total(d.squares(balance), 0.0 * d.log_w_global)
        return Loss(-d.total(d.mean(d.log_w)), guide, guide)

    def _log_evidence(self, d: Draws) -> Array:
        """`log Z(x)`, `[1, B]`."""
        own = d.own["objective"]
        if d.batch is None:
            return own["a"][None]
        xp = ops.xp(own["a"])
        x = stop_gradient(xp.reshape(d.batch, (d.batch.shape[0], -1)))
        rows = own["a"] + xp.sum(x * own["v"], axis=1)
        return (rows if x.shape[0] == d.B else xp.mean(rows, axis=0, keepdims=True))[None]
