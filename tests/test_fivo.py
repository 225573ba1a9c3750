"""Draws that meet between the steps of a scan: the importance-weighted bound without resampling, a filter with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from harness import BACKENDS, Engine, assert_equal
from jax.scipy.special import logsumexp
from scipy.stats import multivariate_normal, norm
from toys import Array, Backend, Ppl

from ppl_lvm import fit
from ppl_lvm.algorithm import Estimator
from ppl_lvm.errors import LegalityError, ProgramError
from ppl_lvm.estimators.dreg import dreg
from ppl_lvm.estimators.pathwise import pathwise
from ppl_lvm.estimators.score import score
from ppl_lvm.estimators.vimco import vimco
from ppl_lvm.objectives.fivo import fivo
from ppl_lvm.objectives.iwae import iwae
from ppl_lvm.program import program

on_both = pytest.mark.parametrize("backend", BACKENDS)
R = np.exp(-0.2)
"""Standard deviation of the observations."""
P = {"a": 0.7, "c": 0.3, "g": 0.5, "s": -0.5}
"""Transition, and the guide's: z_t ~ Normal(c z_{t-1} + g x_t, exp s)."""
X = np.random.default_rng(0).normal(size=(3, 4))
LONG = np.random.default_rng(1).normal(size=(2, 40))
LOCAL = {"a": 0.0, "c": 0.0, "g": 1 / (1 + R**2), "s": 0.5 * np.log(R**2 / (1 + R**2))}
"""Where steps do not look at one another and the guide is their posterior: every increment is log p(x_t)."""


FORWARD = {"a": 0.9, "c": 0.9, "g": 0.0, "s": 0.0}
"""The guide is the model's own step, which does not look at the data: a bootstrap filter."""


def slow(*cell: object) -> Any:
    return pytest.param(*cell, marks=pytest.mark.slow)


def pair(p: Mapping[str, float]) -> tuple[Any, Any]:
    """A hidden Gaussian walk, carried in a pair with what is the same for all draws."""

    def model(ppl: Ppl, x: Array) -> None:
        a = ppl.param("a", p["a"])
        with ppl.plate("data", len(x)):

            def step(carry: Any, x_t: Array) -> Any:
                z, zero = carry
                z = ppl.sample("z", ppl.dist.Normal(a * z, 1.0))
                ppl.sample("x", ppl.dist.Normal(z, R + 0.0 * a), obs=x_t)
                return (z, zero), None

            ppl.scan(step, (0.0 * x[:, 0], 0.0 * x), ppl.xp.moveaxis(x, 1, 0))

    def guide(ppl: Ppl, x: Array) -> None:
        c, g, s = ppl.param("c", p["c"]), ppl.param("g", p["g"]), ppl.param("s", p["s"])
        with ppl.plate("data", len(x)):

            def step(z: Array, x_t: Array) -> Any:
                z = ppl.sample("z", ppl.dist.Normal(c * z + g * x_t, ppl.xp.exp(s)))
                return z, z

            ppl.scan(step, 0.0 * x[:, 0], ppl.xp.moveaxis(x, 1, 0))

    return model, guide


def engine(backend: Backend, x: np.ndarray = X, p: Mapping[str, float] = P) -> Engine:
    return Engine(backend, *pair(p), {"x": x}, portable=True)


def evidence(x: np.ndarray, a: float) -> np.ndarray:
    T = x.shape[1]
    F = np.array([[a ** (t - s) if t >= s else 0.0 for s in range(T)] for t in range(T)])
    return np.atleast_1d(multivariate_normal(np.zeros(T), F @ F.T + R**2 * np.eye(T)).logpdf(x))


def filtered(found: Engine, objective: fivo, seed: int = 0) -> dict[str, np.ndarray]:
    """The bound `[M, B]`, and the arrays of the run that it is made of."""
    chosen = found.plan(objective, {"*": pathwise()})

    def run(key: Any) -> dict[str, Any]:
        draws = found.bound.draws(found.bound.initial, found.batch, key, chosen)
        met = draws.particles
        return {"bound": draws.filtered(), "z": draws.sites["z"].value, "before": met.before, "gain": met.increments}

    with found._precision():
        if found.backend == "numpyro":
            return {n: np.asarray(v) for n, v in jax.jit(run)(jax.random.key(seed)).items()}
        with torch.no_grad():
            return {n: v.numpy() for n, v in run(seed).items()}


@on_both
@pytest.mark.parametrize("estimator", [pathwise(), slow(score())], ids=["pathwise", "score"])
def test_without_resampling_it_is_the_importance_weighted_bound(backend: Backend, estimator: Estimator) -> None:
    found, values = engine(backend), {"z": np.random.default_rng(2).normal(size=(1, 5, 3, 4))}
    filtering = found.loss(fivo(draws=5, threshold=0.0), {"*": estimator}, values=values)
    weighted = found.loss(iwae(draws=5), {"*": estimator}, values=values)
    assert_equal(filtering, float(weighted.value), weighted.gradient, 1e-10)


@on_both
@pytest.mark.parametrize("scheme", ["systematic", slow("multinomial")])
def test_every_particle_goes_on_from_one_that_its_weight_chose(backend: Backend, scheme: Any) -> None:
    """Ancestors are found again from the increments, which only they explain; guide and model must have the same."""
    K = 6
    run = filtered(engine(backend), fivo(draws=K, scheme=scheme, threshold=1.0, outer=50))
    ancestors = lineage(run)
    assert run["before"][..., 1:] == pytest.approx(-np.log(K), abs=1e-12)
    weights = np.exp(run["gain"] - logsumexp_of(run["gain"], 1))[..., :-1]
    counts = (ancestors[:, :, None] == np.arange(K)[None, None, :, None, None]).sum(1)
    assert (counts.sum(1) == K).all()
    if scheme == "systematic":
        assert (counts >= np.floor(K * weights - 1e-9)).all()
        assert (counts <= np.ceil(K * weights + 1e-9)).all()
    # Expected counts are K times the weights; over 50 runs of 3 rows, 3 resamplings, 6 particles.
    z = (counts - K * weights).sum((0, 2, 3)) / np.sqrt((counts - K * weights).var((0, 2, 3)).clip(1e-12) * 50 * 9)
    assert np.abs(z).max() < 4.5
    excess = (counts - K * weights) * weights
    assert abs(excess.mean() / excess.std() * np.sqrt(counts.size)) < 4.5


def lineage(run: Mapping[str, np.ndarray]) -> np.ndarray:
    """`[M, K, B, T - 1]`: which draw each one of steps 2 .. T went on from."""
    z = run["z"]
    now, before = z[..., 1:][:, :, None], z[..., :-1][:, None]  # [M, K, 1, B, T-1], [M, 1, K, B, T-1]
    x = X[:, 1:]
    gain = norm.logpdf(now, P["a"] * before, 1) + norm.logpdf(x, now, R)
    gain = gain - norm.logpdf(now, P["c"] * before + P["g"] * x, np.exp(P["s"]))
    away = np.abs(gain - run["gain"][..., 1:][:, :, None])
    assert away.min(2).max() < 1e-10
    return away.argmin(2)


def logsumexp_of(x: np.ndarray, axis: int) -> np.ndarray:
    return np.log(np.exp(x).sum(axis, keepdims=True))


@on_both
@pytest.mark.parametrize("estimator", [pathwise(), slow(score())], ids=["pathwise", "score"])
def test_gradients_by_hand_along_the_same_lineages(backend: Backend, estimator: Estimator) -> None:
    """The bound differentiated with the ancestors as they were: the resampling's own score is left out."""
    K, seed = 4, 3
    found = engine(backend)
    objective = fivo(draws=K, threshold=1.0)
    key: Any = jax.random.split(jax.random.key(seed), 1)[0] if backend == "numpyro" else seed * 100_000
    chosen = found.plan(objective, {"*": estimator})

    def run(key: Any) -> dict[str, Any]:
        draws = found.bound.draws(found.bound.initial, found.batch, key, chosen)
        return {"z": draws.sites["z"].value, "gain": draws.particles.increments}

    with found._precision():
        made = {n: np.asarray(v.detach() if backend == "pyro" else v) for n, v in run(key).items()}
    parents, z = lineage(made)[0], made["z"][0]  # [K, B, T-1], [K, B, T]
    before = np.concatenate([np.zeros((K, 3, 1)), np.take_along_axis(z[..., :-1], parents, 0)], -1)
    eps = (z - P["c"] * before - P["g"] * X) / np.exp(P["s"])
    scored = isinstance(estimator, score)

    def bound(p: Mapping[str, Array]) -> tuple[Array, Array]:
        rows, scores, at = jnp.zeros(3), jnp.zeros((K, 3)), jnp.zeros((K, 3))
        for t in range(4):
            if t:
                at = at[parents[..., t - 1], jnp.arange(3)]
            loc, x = p["c"] * at + p["g"] * X[:, t], X[:, t]
            now = jnp.asarray(z[..., t]) if scored else loc + jnp.exp(p["s"]) * eps[..., t]
            log_q = jax.scipy.stats.norm.logpdf(now, loc, jnp.exp(p["s"]))
            log_p = jax.scipy.stats.norm.logpdf(now, p["a"] * at, 1.0) + jax.scipy.stats.norm.logpdf(x, now, R)
            rows = rows + logsumexp(log_p - log_q, axis=0) - np.log(K)
            scores, at = scores + log_q, now
        return rows, scores

    def loss(p: Mapping[str, Array]) -> Array:
        rows, scores = bound(p)
        whole = scores.sum(0) * jax.lax.stop_gradient(rows) if scored else 0.0
        return -(rows + whole - jax.lax.stop_gradient(whole)).sum()

    with jax.enable_x64(True):
        value, gradient = jax.value_and_grad(loss)({n: jnp.asarray(v) for n, v in P.items()})
    exact = {n: np.asarray(g) for n, g in gradient.items()}
    assert_equal(found.loss(objective, {"*": estimator}, seed=seed), float(value), exact, 1e-10)


@on_both
@pytest.mark.parametrize(("K", "threshold"), [(3, 1.0), slow(1, 1.0), slow(3, 0.5), slow(3, 0.0)])
def test_it_is_the_evidence_where_every_increment_is(backend: Backend, K: int, threshold: float) -> None:
    bound = filtered(engine(backend, p=LOCAL), fivo(draws=K, threshold=threshold))["bound"]
    np.testing.assert_allclose(bound[0], evidence(X, 0.0), rtol=0, atol=1e-10)


@on_both
@pytest.mark.parametrize(
    ("scheme", "threshold"), [("systematic", 0.5), slow("systematic", 1.0), slow("multinomial", 1.0)]
)
def test_its_exponential_is_unbiased_and_it_beats_importance_weights_over_long_sequences(
    backend: Backend, scheme: Any, threshold: float
) -> None:
    found, truth = engine(backend, LONG, FORWARD), evidence(LONG, FORWARD["a"])
    bound = filtered(found, fivo(draws=32, scheme=scheme, threshold=threshold, outer=2000))["bound"]
    ratio = np.exp(bound - truth)
    error = ratio.std(0) / np.sqrt(len(ratio))
    print(ratio.mean(0), error, bound.mean(0), truth)
    assert (error < 0.05).all()
    assert (np.abs(ratio.mean(0) - 1) < 4.5 * error).all()
    assert (bound.mean(0) < truth).all()
    few = fivo(draws=4, scheme=scheme, threshold=threshold, outer=40_000)
    short = filtered(engine(backend, X, FORWARD), few)["bound"]
    ratio = np.exp(short - evidence(X, FORWARD["a"]))
    error = ratio.std(0) / np.sqrt(len(ratio))
    assert (error < 0.006).all()
    assert (np.abs(ratio.mean(0) - 1) < 4.5 * error).all()
    weighted = filtered(found, fivo(draws=32, threshold=0.0, outer=2000))["bound"]
    assert (weighted.mean(0) < bound.mean(0) - 4.5 * (weighted.std(0) + bound.std(0)) / np.sqrt(2000)).all()


@on_both
def test_a_fit_of_a_shipped_program(backend: Backend) -> None:
    rng = np.random.default_rng(0)
    run = fit(program("linear_gaussian_chain"), data=rng.normal(size=(20, 6)), recipe="fivo", backend=backend, steps=3)
    assert np.isfinite(run.history["loss"]).all()
    assert np.isfinite(run.log_likelihood(draws=50).values).all()


def test_what_is_refused() -> None:
    found = engine("pyro")
    for estimator, why in ((vimco(), "the draws of a row meet"), (dreg(), "draws are resampled between steps")):
        with pytest.raises(LegalityError, match=why):
            found.plan(fivo(draws=2), {"*": estimator})
    with pytest.raises(LegalityError, match="chunk evaluates draws apart"):
        found.plan(fivo(draws=2, chunk=1), {"*": pathwise()})

    def still(ppl: Ppl, x: Array) -> None:
        with ppl.plate("data", len(x)):
            ppl.sample("z", ppl.dist.Normal(ppl.param("a", 0.1) + 0.0 * x[:, 0], 1.0))

    def seen(ppl: Ppl, x: Array) -> None:
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", ppl.dist.Normal(0.0 * x[:, 0], 1.0))
            ppl.sample("x", ppl.dist.Normal(z[..., None] + 0.0 * x, 1.0).to_event(1), obs=x)

    with pytest.raises(LegalityError, match=r"Sites \['x', 'z'\] are not inside a ppl.scan of guide and model"):
        Engine("pyro", seen, still, {"x": X}, portable=True).plan(fivo(), {"*": pathwise()})


def test_a_site_of_the_model_alone_cannot_be_summed_out_where_draws_meet() -> None:
    model, guide = pair(P)

    def with_class(ppl: Ppl, x: Array) -> None:
        with ppl.plate("classes", len(x)):
            ppl.sample("y", ppl.dist.Bernoulli(0.3 + 0.0 * x[:, 0]))
        model(ppl, x)

    with pytest.raises(LegalityError, match=r"condition on it, or sum it out in the model\."):
        Engine("pyro", with_class, guide, {"x": X}, portable=True).plan(fivo(draws=2), {"*": pathwise()})


@on_both
def test_scans_that_do_not_step_together_are_refused(backend: Backend) -> None:
    model, guide = pair(P)

    def twice(ppl: Ppl, x: Array) -> None:
        guide(ppl, x)
        ppl.scan(lambda carry, x_t: (carry, x_t), 0.0 * x[:, 0], ppl.xp.moveaxis(x, 1, 0))

    def turned(ppl: Ppl, x: Array) -> None:
        c = ppl.param("c", P["c"])
        with ppl.plate("data", len(x)):

            def step(z: Array, x_t: Array) -> Any:
                z = ppl.sample("z", ppl.dist.Normal(c * z[0] + x_t, 1.0))
                return z[None], None

            ppl.scan(step, 0.0 * x[None, :, 0], ppl.xp.moveaxis(x, 1, 0))

    for other, why in ((twice, "each needs one ppl.scan"), (turned, r"rows \(3\) must be its first axis")):
        with pytest.raises(ProgramError, match=why):
            Engine(backend, model, other, {"x": X}, portable=True).loss(fivo(draws=2, threshold=1.0), {"*": pathwise()})
