"""Own parameters of estimators that are trained on the variance of the guide's gradient.

The estimator of these tests is the control variate of a continuous site that REBAR and RELAX are made of for discrete
ones: with z the draw and s = z + shift the value that the program sees besides,
`[h(z) - eta h(s)] grad log q(z) + eta grad h(s)`. Its scale and its shift are its own parameters.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from harness import BACKENDS, Engine
from toys import GAUSSIANS2, GLOBAL_ROWS, MIXED_ZY, Backend, Toy

from ppl_lvm import ops
from ppl_lvm.algorithm import Estimator, Objective, SiteDistribution, Variant
from ppl_lvm.estimators.pathwise import pathwise
from ppl_lvm.estimators.score import score
from ppl_lvm.estimators.stl import stl
from ppl_lvm.objectives.elbo import elbo
from ppl_lvm.objectives.iwae import iwae
from ppl_lvm.ops import Array, stop_gradient

on_both = pytest.mark.parametrize("backend", BACKENDS)


class controlled(Estimator):
    site = "reparameterised"
    least_variance = True

    def count(self, support: int) -> int:
        return 2

    def initial_own(self, features: int, weights: int = 0) -> dict[str, Any]:
        return {"eta": [0.6], "shift": [0.3]}

    def variants(self, dist: SiteDistribution, index: Array) -> Variant:
        eta, shift = dist.own["eta"][0], dist.own["shift"][0]
        live = dist.rsample()
        drawn = stop_gradient(live)
        log_q = dist.log_prob(drawn)
        xp = ops.xp(log_q)
        first, nothing = index == 0, xp.zeros_like(log_q)
        score = log_q - stop_gradient(log_q)
        wide = xp.reshape(first, tuple(first.shape) + (1,) * (drawn.ndim - log_q.ndim))
        return Variant(
            xp.where(wide, drawn, live + shift),
            weight=xp.where(first, nothing + 1.0, nothing),
            credit=xp.where(first, score, -eta * score),
            through=xp.where(first, nothing, nothing + eta),
        )


CASES = [
    pytest.param(GAUSSIANS2, elbo(draws=2), {"z1": controlled(), "z2": pathwise()}, id="elbo"),
    pytest.param(GAUSSIANS2, iwae(draws=3), {"z1": controlled(), "z2": pathwise()}, id="iwae"),
    pytest.param(GAUSSIANS2, elbo(), {"z1": controlled(), "z2": stl()}, id="frozen"),
    pytest.param(MIXED_ZY, elbo(draws=2), {"y": score(), "z": controlled()}, id="below a score"),
    pytest.param(GLOBAL_ROWS, elbo(outer=2), {"g": controlled(), "z": pathwise()}, id="global"),
]


@on_both
@pytest.mark.parametrize(("toy", "objective", "estimators"), CASES)
def test_the_gradient_of_the_squared_gradient(
    backend: Backend, toy: Toy, objective: Objective, estimators: dict[str, Estimator]
) -> None:
    """What is differentiated is the gradient that the same run gives at other own parameters, stopped signals too."""
    engine, rows = Engine.of(backend, toy), len(toy.data["x"])
    sites = [n for n, e in engine.plan(objective, estimators).estimators.items() if e.least_variance]
    at = {s: {"eta": np.array([0.6]), "shift": np.array([0.3])} for s in sites}
    h = 1e-4

    def loss(site: str, name: str, by: float) -> float:
        own = {**at, site: {**at[site], name: at[site][name] + by}}
        found = engine.loss(objective, estimators, own=own, seed=4)
        return sum(float(((found.gradient[n] / rows) ** 2).sum()) for n in toy.guide_params)

    found = engine.loss(objective, estimators, own=at, seed=4)
    for site in sites:
        for name in at[site]:
            slope = (loss(site, name, h) - loss(site, name, -h)) / (2 * h)
            assert abs(slope) > 1e-3
            assert float(found.own[site][name][0]) == pytest.approx(slope, rel=1e-6), (site, name)
