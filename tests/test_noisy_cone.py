"""The noisy cone: its evidence by quadrature, and the ladder of bounds of Programmable VI (their Table 4) re-optimised.

    python -m pytest tests/test_noisy_cone.py -m slow -s         prints the tables
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from harness import BACKENDS
from scipy.special import logsumexp
from scipy.stats import norm
from toys import Backend

from ppl_lvm import Fit, backends, fit, legality
from ppl_lvm.backends.base import Call
from ppl_lvm.program import program

Z = np.array([5.0])
EVIDENCE = -5.32323
on_both = pytest.mark.parametrize("backend", BACKENDS)
STEPS = 2000


def evidence() -> float:
    """Over the radius alone: r^2 = x^2 + y^2 is exponential with mean 200."""
    s = np.linspace(1e-6, 400.0, 4_000_001)
    density = np.exp(-s / 200) / 200 * norm.pdf(5.0, s, 0.1 + s / 100)
    return float(np.log(np.trapezoid(density, s)))


def test_the_evidence() -> None:
    assert evidence() == pytest.approx(EVIDENCE, abs=1e-5)


def fitted(backend: Backend, circle: bool, steps: int = STEPS, **overrides: Any) -> Fit:
    rate = {"schedule": "exponential", "start": 0.02, "end": 0.0005, "steps": steps}
    optimizer = {"name": "adam", "learning_rate": rate}
    chosen = program("noisy_cone", circle=circle)
    return fit(chosen, data=Z, backend=backend, dtype="float64", steps=steps, optimizer=optimizer, **overrides)


def log_w(run: Fit, outer: int, times: int) -> np.ndarray:
    """Log weights `[outer times, K]` of the objective at the fitted parameters."""
    assert run.recipe.objective is not None
    objective = run.recipe.objective.model_copy(update={"outer": outer})
    plan = legality.plan(objective, run.recipe.estimator, run._bound.structure)[0]
    host = backends.load(run.backend)
    batch = run._bound.batch(Call.of(Z))
    found = [run._bound.log_w(run._trained, batch, host.key_of(i), plan) for i in range(times)]
    return np.concatenate([np.asarray(host.to_numpy(w))[..., 0] for w in found])


@on_both
def test_densities_of_a_fit_are_those_of_its_objective(backend: Backend) -> None:
    """Its importance weights have the guide's estimated density, and u's own has no part in them."""
    run = fitted(backend, True, steps=1, start={"sigma": 0.3}, objective={"name": "elbo", "marginal": {"u": 20}})
    likelihood = run.log_likelihood(draws=100_000)
    assert likelihood.values == pytest.approx([EVIDENCE], abs=0.06)  # 4.5 standard errors
    drawn = run.posterior(draws=2000)
    at = np.sqrt(5.0) * np.stack([np.cos(2 * np.pi * drawn.values["u"]), np.sin(2 * np.pi * drawn.values["u"])])
    given_u = norm.logpdf(np.stack([drawn.values["x"], drawn.values["y"]]), at, run.params["sigma"]).sum(0)
    # With u_0 among the draws, q^ is at least a 20th of q(x, y | u_0), and on a ring of that width less than it.
    assert (drawn.log_q > given_u - np.log(20)).all()
    assert drawn.log_q.mean() < given_u.mean() - 0.5


LADDER: dict[str, tuple[bool, dict[str, Any], tuple[float, float]]] = {
    "ELBO": (False, {"name": "elbo"}, (-8.0845, -8.0645)),
    "IWELBO(5)": (False, {"name": "iwae", "draws": 5}, (-7.60, -7.50)),
    "HVI": (True, {"name": "elbo", "marginal": {"u": 1}}, (-9.769, -9.729)),
    "IWHVI(5)": (True, {"name": "elbo", "marginal": {"u": 5}}, (-8.199, -8.159)),
    "DIWHVI(5, 5)": (True, {"name": "iwae", "draws": 5, "marginal": {"u": 5}}, (-7.331, -7.291)),
}
"""Guide, objective, and where the optimal bound is by quadrature and independent optimisation."""


@pytest.mark.slow
@pytest.mark.parametrize("name", LADDER)
@on_both
def test_the_ladder_of_bounds(backend: Backend, name: str) -> None:
    circle, objective, (low, high) = LADDER[name]
    run = fitted(backend, circle, objective={**objective, "outer": 64})
    found = log_w(run, 20_000, 10)
    bounds = logsumexp(found, axis=1) - np.log(found.shape[1])
    error = bounds.std() / np.sqrt(len(bounds))
    print(f"{backend:8} {name:12} {bounds.mean():8.4f} +- {error:.4f}   in [{low}, {high}]")
    assert error < 0.004
    assert low < bounds.mean() < high < EVIDENCE


@pytest.mark.slow
@on_both
def test_a_proposal_that_covers_the_ring(backend: Backend) -> None:
    """Importance-sampled evidence from 1000 draws, and the effective part of 4,000,000 draws."""
    found = {}
    for name, draws in (("vis", 2000), ("elbo", 64)):
        objective = {"name": name, "draws": draws}
        run = fitted(backend, False, objective=objective, estimator="score" if name == "vis" else "auto", **WIDE[name])
        weights = log_w(run, 400_000 // draws, 10).ravel()
        blocks = logsumexp(weights.reshape(-1, 1000), axis=1) - np.log(1000)
        ess = np.exp(2 * logsumexp(weights) - logsumexp(2 * weights)) / len(weights)
        found[name] = blocks.mean(), ess
        print(f"{backend:8} {name:5} IW-1000 {blocks.mean():.4f}   relative ESS {ess:.4f}   evidence {EVIDENCE}")
    assert abs(found["vis"][0] - EVIDENCE) < 0.03
    assert found["vis"][1] >= 0.02
    assert found["elbo"][0] < EVIDENCE - 1.5
    assert found["elbo"][1] <= 0.01


WIDE: dict[str, dict[str, Any]] = {"vis": {"start": {"scale": np.full(2, 2.0), "loc": np.full(2, 0.5)}}, "elbo": {}}
"""A chi-square proposal starts wide: few draws do not see what a narrow one misses."""
