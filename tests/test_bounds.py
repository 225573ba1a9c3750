"""The bound of twenty local-latent Gaussian rows at K = 16, however rows reach the engine.

Full data, rows that the program picks in its own plate, mini-batches of the engine, with and without a latent that all
rows share: the mean of each is the same number, from quadrature (`oracle`), and below log p(x). A slow test holds the
quadrature against ten million draws of plain NumPy.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import numpy as np
import pytest
from harness import BACKENDS, Engine, z_scores
from oracle import exact, log_evidence
from scipy.stats import norm
from toys import GLOBAL_ROWS, ROWS, Backend, Toy, native_rows

from ppl_lvm.errors import LegalityError
from ppl_lvm.estimators.pathwise import pathwise
from ppl_lvm.objectives.elbo import elbo
from ppl_lvm.objectives.iwae import iwae

on_both = pytest.mark.parametrize("backend", BACKENDS)
on_each_toy = pytest.mark.parametrize(
    "toy", [ROWS, pytest.param(GLOBAL_ROWS, marks=pytest.mark.slow)], ids=lambda toy: toy.name
)
K, RUNS = 16, {"pyro": 200, "numpyro": 4000}
X = ROWS.data["x"]


def check(engine: Engine, expected: float, evidence: float, total_rows: int | None = None) -> None:
    found = engine.loss(iwae(draws=K), {"*": pathwise()}, runs=RUNS[engine.backend], total_rows=total_rows)
    bound = -found.value
    error = bound.std(ddof=1) / np.sqrt(len(bound))
    assert abs(z_scores(bound, np.asarray(expected))) < 4.5, (bound.mean(), error, expected)
    assert bound.mean() < evidence + 4.5 * error, (bound.mean(), error, evidence)


def bound_of(toy: Toy, rows: slice = slice(None), scale: float = 1.0) -> float:
    return -exact(toy, "iwae", K, data={"x": toy.data["x"][rows]}, scale=scale).value


@on_each_toy
def test_the_bound_is_below_the_evidence(toy: Toy) -> None:
    """Row by row for rows alone; batches of an even partition have the bound of all rows as their mean."""
    assert bound_of(toy) < log_evidence(toy) < bound_of(toy) + 5.0
    parts = [bound_of(toy, slice(i, i + 5), 4.0) for i in range(0, 20, 5)]
    np.testing.assert_allclose(np.mean(parts), bound_of(toy), rtol=1e-9)


@on_both
@on_each_toy
def test_full_data(backend: Backend, toy: Toy) -> None:
    check(Engine.of(backend, toy), bound_of(toy), log_evidence(toy))


@on_both
@on_each_toy
def test_rows_that_the_program_picks(backend: Backend, toy: Toy) -> None:
    model, guide = native_rows(backend, with_global=toy is GLOBAL_ROWS, subsample_size=5)
    engine = Engine(backend, model, guide, {"x": X}, portable=False)
    check(engine, bound_of(toy), log_evidence(toy))


@on_both
@on_each_toy
def test_mini_batches_of_the_engine(backend: Backend, toy: Toy) -> None:
    """Five of twenty rows: their bounds times four, the global's terms once."""
    part = {"x": toy.data["x"][5:10]}
    engine = Engine.of(backend, toy, part)
    check(engine, bound_of(toy, slice(5, 10), 4.0), np.inf, total_rows=20)


@on_both
def test_a_scale_of_the_user(backend: Backend) -> None:
    """Refused inside a bound of several draws; times the densities in a mean."""
    model, guide = native_rows(backend)
    scaled: list[Callable[..., None]] = [
        import_module("pyro.poutine" if backend == "pyro" else "numpyro.handlers").scale(part, scale=4.0)
        for part in (model, guide)
    ]
    engine = Engine(backend, scaled[0], scaled[1], {"x": X[5:10]}, portable=False)
    with pytest.raises(LegalityError, match=r"Sites \['x', 'z'\] are scaled .*no meaning inside a function of several"):
        engine.plan(iwae(draws=K), {"*": pathwise()})
    found = engine.loss(elbo(draws=K), {"*": pathwise()}, runs=200)
    assert abs(z_scores(found.value, np.asarray(exact(ROWS, "elbo", data={"x": X[5:10]}, scale=4.0).value))) < 4.5


@pytest.mark.slow
@on_each_toy
def test_the_quadrature_against_ten_million_draws(toy: Toy) -> None:
    """10^7 draws of every row's latent: 625,000 bounds of 16 draws."""
    rng, p = np.random.default_rng(0), {n: np.asarray(v) for n, v in toy.params.items()}
    x = toy.data["x"]
    bounds = []
    for _ in range(125):
        R = 5000
        g, over = np.zeros(R), np.zeros(R)
        if toy is GLOBAL_ROWS:
            g = p["q_g_loc"] + np.exp(p["q_g_log_scale"]) * rng.normal(size=R)
            over = norm.logpdf(g, 0.0, np.exp(p["g_log_scale"]))
            over -= norm.logpdf(g, p["q_g_loc"], np.exp(p["q_g_log_scale"]))
        rows = np.zeros(R)
        for x_n in x:
            loc = p["q_z_gain"] * x_n + p["q_z_bias"] + p.get("q_z_g", 0.0) * g
            e = rng.normal(size=(K, R))
            z = loc + np.exp(p["q_z_log_scale"]) * e
            log_w = -0.5 * (z / np.exp(p["z_log_scale"])) ** 2 - p["z_log_scale"] - 0.5 * np.log(2 * np.pi)
            log_w += -0.5 * ((x_n - g - z) / np.exp(p["x_log_scale"])) ** 2 - p["x_log_scale"]
            log_w += 0.5 * e**2 + p["q_z_log_scale"]
            top = log_w.max(0)
            rows += top + np.log(np.exp(log_w - top).mean(0))
        bounds.append(over + rows)
    found = np.concatenate(bounds)
    error = found.std(ddof=1) / np.sqrt(len(found))
    print(toy.name, found.mean(), error, bound_of(toy), log_evidence(toy))
    assert error < 0.01
    assert abs(found.mean() - bound_of(toy)) < 4.5 * error
