"""`ppl.scan` on both backends: densities by hand, the exact posterior, the same program as a loop, and refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from harness import BACKENDS, Engine, assert_equal
from scipy.stats import norm
from toys import Array, Backend, Ppl

from ppl_lvm import fit
from ppl_lvm.algorithm import Estimator, Objective
from ppl_lvm.errors import DataError, LegalityError, ProgramError
from ppl_lvm.estimators.dreg import dreg
from ppl_lvm.estimators.enumerate import enumerate as enumerated
from ppl_lvm.estimators.pathwise import pathwise
from ppl_lvm.estimators.score import score
from ppl_lvm.estimators.vimco import vimco
from ppl_lvm.objectives.elbo import elbo
from ppl_lvm.objectives.iwae import iwae
from ppl_lvm.program import Program

on_both = pytest.mark.parametrize("backend", BACKENDS)
N, T = 3, 4
X = np.random.default_rng(0).normal(size=(N, T))
A, C, S = 0.7, 0.3, -0.5
"""Transition, the guide's transition, its log scale."""


def model(ppl: Ppl, x: Array) -> None:
    a = ppl.param("a", A)
    with ppl.plate("data", len(x)):

        def step(z: Array, x_t: Array) -> tuple[Array, Array]:
            z = ppl.sample("z", ppl.dist.Normal(a * z, 1.0))
            ppl.sample("x", ppl.dist.Normal(z, ppl.xp.exp(0.0 * a - 0.2)), obs=x_t)
            return z, z

        ppl.scan(step, 0.0 * x[:, 0], ppl.xp.moveaxis(x, 1, 0))


def guide(ppl: Ppl, x: Array) -> None:
    c, s = ppl.param("c", C), ppl.param("s", S)
    with ppl.plate("data", len(x)):

        def step(z: Array, x_t: Array) -> tuple[Array, Array]:
            z = ppl.sample("z", ppl.dist.Normal(c * z + 0.5 * x_t, ppl.xp.exp(s)))
            return z, z

        ppl.scan(step, 0.0 * x[:, 0], ppl.xp.moveaxis(x, 1, 0))


def looped_model(ppl: Ppl, x: Array) -> None:
    a, z = ppl.param("a", A), 0.0 * x[:, 0]
    with ppl.plate("data", len(x)):
        for t in range(T):
            z = ppl.sample(f"z{t}", ppl.dist.Normal(a * z, 1.0))
            ppl.sample(f"x{t}", ppl.dist.Normal(z, ppl.xp.exp(0.0 * a - 0.2)), obs=x[:, t])


def looped_guide(ppl: Ppl, x: Array) -> None:
    c, s, z = ppl.param("c", C), ppl.param("s", S), 0.0 * x[:, 0]
    with ppl.plate("data", len(x)):
        for t in range(T):
            z = ppl.sample(f"z{t}", ppl.dist.Normal(c * z + 0.5 * x[:, t], ppl.xp.exp(s)))


def engine(backend: Backend, model: Any = model, guide: Any = guide, **data: np.ndarray) -> Engine:
    return Engine(backend, model, guide, data or {"x": X}, portable=True)


def values(K: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(1, K, N, T))


@on_both
def test_densities_of_a_scan_are_sums_over_its_steps(backend: Backend) -> None:
    z = values(2)
    before = np.concatenate([np.zeros((1, 2, N, 1)), z[..., :-1]], axis=-1)
    sites = engine(backend).sites(iwae(draws=2), {"*": pathwise()}, values={"z": z})
    np.testing.assert_allclose(sites["z"].value, z, atol=0)
    np.testing.assert_allclose(sites["z"].log_p, norm.logpdf(z, A * before, 1).sum(-1), atol=1e-12)
    np.testing.assert_allclose(sites["z"].log_q, norm.logpdf(z, C * before + 0.5 * X, np.exp(S)).sum(-1), atol=1e-12)
    np.testing.assert_allclose(sites["x"].log_p, norm.logpdf(X, z, np.exp(-0.2)).sum(-1), atol=1e-12)


@on_both
@pytest.mark.parametrize(
    ("objective", "estimator"),
    [(elbo(), pathwise()), (elbo(draws=2), score()), (iwae(draws=3), pathwise()), (iwae(draws=3), vimco())],
    ids=["elbo-pathwise", "elbo-score", "iwae-pathwise", "iwae-vimco"],
)
def test_a_scan_is_the_loop_that_it_stands_for(backend: Backend, objective: Objective, estimator: Estimator) -> None:
    z = values(objective.draws)
    scanned = engine(backend).loss(objective, {"*": estimator}, values={"z": z})
    looped = engine(backend, looped_model, looped_guide).loss(
        objective, {"*": estimator}, values={f"z{t}": z[..., t] for t in range(T)}
    )
    if estimator.scored:
        # One score for all steps, where the loop's sites have one each and leave out the costs before them.
        assert scanned.value == pytest.approx(looped.value, abs=1e-12)
        np.testing.assert_allclose(scanned.gradient["a"], looped.gradient["a"], atol=1e-12)
    else:
        assert_equal(scanned, float(looped.value), looped.gradient, 1e-11)


def test_scores_of_a_scan_by_hand() -> None:
    """One draw: the gradient of -log w plus (-log w) times the gradient of log q, of all steps together."""
    z = values(1)
    before = np.concatenate([np.zeros((1, 1, N, 1)), z[..., :-1]], axis=-1)
    x_rows = norm.logpdf(X, z, np.exp(-0.2)).sum(-1)
    log_w = norm.logpdf(z, A * before, 1).sum(-1) + x_rows - norm.logpdf(z, C * before + 0.5 * X, np.exp(S)).sum(-1)
    residual = (z - C * before - 0.5 * X) / np.exp(S)
    expected = {
        "a": -((z - A * before) * before).sum(),
        "c": -((log_w - 1) * (residual * before / np.exp(S)).sum(-1)).sum(),
        "s": -((log_w - 1) * (residual**2 - 1).sum(-1)).sum(),
    }
    for backend in BACKENDS:
        found = engine(backend).loss(elbo(), {"*": score()}, values={"z": z})
        assert_equal(found, -log_w.sum(), {n: np.asarray(v) for n, v in expected.items()}, 1e-10)


def test_both_backends_give_the_same_with_frozen_guides() -> None:
    z, found = values(3), []
    for backend in BACKENDS:
        found.append(engine(backend).loss(iwae(draws=3), {"*": dreg()}, values={"z": z}))
    assert_equal(found[0], float(found[1].value), found[1].gradient, 1e-11)


def exact_guide(ppl: Ppl, x: Array, slope: Array, shift: Array, scale: Array) -> None:
    one = ppl.param("one", 1.0)
    with ppl.plate("data", len(x)):

        def step(z: Array, at: tuple[Array, Array, Array]) -> tuple[Array, Array]:
            slope, shift, scale = at
            z = ppl.sample("z", ppl.dist.Normal(one * slope * z + shift, scale))
            return z, z

        steps = tuple(ppl.xp.moveaxis(a, 1, 0) for a in (slope, shift, scale))
        ppl.scan(step, 0.0 * x[:, 0], steps)


def exact_model(ppl: Ppl, x: Array, slope: Array, shift: Array, scale: Array) -> None:
    model(ppl, x)


@on_both
def test_with_the_exact_posterior_every_weight_is_the_evidence(backend: Backend) -> None:
    noise = np.exp(-0.2) ** 2
    slope, shift, scale = np.zeros((N, T)), np.zeros((N, T)), np.zeros((N, T))
    log_p = np.zeros(N)
    # The future's message about z_t is c exp(-lam z^2 / 2 + eta z); x_t adds to it, and z_t is integrated out.
    lam, eta = 0.0, np.zeros(N)
    for t in reversed(range(T)):
        lam, eta = lam + 1 / noise, eta + X[:, t] / noise
        precision = 1 + lam
        slope[:, t], shift[:, t], scale[:, t] = A / precision, eta / precision, precision**-0.5
        lam, eta = A**2 * (1 - 1 / precision), A * eta / precision
    covariance = np.zeros((T, T))
    variance = 0.0
    for t in range(T):
        variance = A**2 * variance + 1
        for u in range(t, T):
            covariance[t, u] = covariance[u, t] = A ** (u - t) * variance
    covariance += noise * np.eye(T)
    log_p = -0.5 * (
        np.einsum("nt,tu,nu->n", X, np.linalg.inv(covariance), X) + np.linalg.slogdet(2 * np.pi * covariance)[1]
    )
    bound = engine(backend, exact_model, exact_guide, x=X, slope=slope, shift=shift, scale=scale)
    log_w = bound.log_w(iwae(draws=3), {"*": pathwise()})
    np.testing.assert_allclose(log_w, np.broadcast_to(log_p, (1, 3, N)), atol=1e-10)


def masked_model(ppl: Ppl, x: Array, seen: Array) -> None:
    a = ppl.param("a", A)
    with ppl.plate("data", len(x)):

        def step(z: Array, at: tuple[Array, Array]) -> tuple[Array, Array]:
            x_t, here = at
            z = ppl.sample("z", ppl.dist.Normal(a * z, 1.0).mask(here > 0))
            ppl.sample("x", ppl.dist.Normal(z, 1.0).mask(here > 0), obs=x_t)
            return z, z

        ppl.scan(step, 0.0 * x[:, 0], (ppl.xp.moveaxis(x, 1, 0), ppl.xp.moveaxis(seen, 1, 0)))


def masked_guide(ppl: Ppl, x: Array, seen: Array) -> None:
    guide(ppl, x)


@on_both
def test_a_scan_may_have_no_output(backend: Backend) -> None:
    """`return carry, None`, as jax.lax.scan is written, gives no output and the same densities."""

    def silent(ppl: Ppl, x: Array) -> None:
        a = ppl.param("a", A)
        with ppl.plate("data", len(x)):

            def step(z: Array, x_t: Array) -> tuple[Array, None]:
                z = ppl.sample("z", ppl.dist.Normal(a * z, 1.0))
                ppl.sample("x", ppl.dist.Normal(z, ppl.xp.exp(0.0 * a - 0.2)), obs=x_t)
                return z, None

            assert ppl.scan(step, 0.0 * x[:, 0], ppl.xp.moveaxis(x, 1, 0))[1] is None

    z = values(1)
    with_output = engine(backend).sites(elbo(), {"*": score()}, values={"z": z})
    without = engine(backend, silent).sites(elbo(), {"*": score()}, values={"z": z})
    for name in ("z", "x"):
        np.testing.assert_array_equal(without[name].log_p, with_output[name].log_p)


@on_both
def test_masked_steps_do_not_count(backend: Backend) -> None:
    seen = (np.arange(T) < np.array([[4], [2], [0]])).astype(float)
    z = values(1)
    before = np.concatenate([np.zeros((1, 1, N, 1)), z[..., :-1]], axis=-1)
    sites = engine(backend, masked_model, masked_guide, x=X, seen=seen).sites(elbo(), {"*": score()}, values={"z": z})
    np.testing.assert_allclose(sites["z"].log_p, (seen * norm.logpdf(z, A * before, 1)).sum(-1), atol=1e-12)
    np.testing.assert_allclose(sites["x"].log_p, (seen * norm.logpdf(X, z, 1)).sum(-1), atol=1e-12)


@on_both
def test_missing_steps_have_no_density(backend: Backend) -> None:
    holes = X.copy()
    holes[0, 1] = holes[2, 3] = holes[2, 0] = np.nan
    options: dict[str, Any] = {"recipe": "elbo", "backend": backend, "dtype": "float64", "steps": 1, "missing": "mask"}
    run = fit(Program("chain", model, guide, portable=True, arguments=("x",)), data=holes, **options)
    found = run.posterior(4)
    likelihood = norm.logpdf(X, found.values["z"], np.exp(-0.2))
    expected = np.where(np.isnan(holes), 0.0, likelihood).sum(-1)
    np.testing.assert_allclose(found.log_likelihood["x"], expected, atol=1e-10)


@on_both
def test_a_scan_is_fitted_and_predicted_from(backend: Backend) -> None:
    run = fit(Program("chain", model, guide, portable=True, arguments=("x",)), data=X, recipe="iwae", draws=3,
              backend=backend, steps=3, batch_size=2, dtype="float64")  # fmt: skip
    again = fit(Program("chain", model, guide, portable=True, arguments=("x",)), data=X, recipe="iwae", draws=3,
                backend=backend, steps=3, batch_size=2, dtype="float64", compile="eager")  # fmt: skip
    np.testing.assert_allclose(run.history["loss"], again.history["loss"], rtol=1e-10)
    assert run.posterior(5).values["z"].shape == (5, N, T)
    assert run.predictive(2)["x"].shape == (2, N, T)


@on_both
def test_a_site_of_a_scan_is_not_enumerated(backend: Backend) -> None:
    def coins(ppl: Ppl, x: Array) -> None:
        p = ppl.param("p", 0.2)
        with ppl.plate("data", len(x)):

            def step(carry: Array, x_t: Array) -> tuple[Array, Array]:
                z = ppl.sample("z", ppl.dist.Bernoulli(logits=p + 0.0 * carry))
                ppl.sample("x", ppl.dist.Normal(z, 1.0), obs=x_t)
                return carry, z

            ppl.scan(step, 0.0 * x[:, 0], ppl.xp.moveaxis(x, 1, 0))

    def guess(ppl: Ppl, x: Array) -> None:
        q = ppl.param("q", -0.2)
        with ppl.plate("data", len(x)):

            def step(carry: Array, x_t: Array) -> tuple[Array, Array]:
                return carry, ppl.sample("z", ppl.dist.Bernoulli(logits=q + 0.0 * carry))

            ppl.scan(step, 0.0 * x[:, 0], ppl.xp.moveaxis(x, 1, 0))

    bound = engine(backend, coins, guess)
    assert np.isfinite(bound.loss(elbo(), {"*": score()}).value)
    with pytest.raises(LegalityError, match=r"'z' under estimator 'enumerate'.*no finite support"):
        bound.plan(elbo(), {"*": enumerated()})


@on_both
def test_what_a_scan_cannot_be_is_refused(backend: Backend) -> None:
    def nested(ppl: Ppl, x: Array) -> None:
        ppl.scan(lambda c, x_t: ppl.scan(lambda d, _: (d, d), c, x_t[None]), x[0], x)

    def empty(ppl: Ppl, x: Array) -> None:
        ppl.scan(lambda c, _: (c, c), x[0], None)

    def uneven(ppl: Ppl, x: Array) -> None:
        ppl.scan(lambda c, _: (c, c), x[0], (x, x[:2]))

    def twice(ppl: Ppl, x: Array) -> None:
        ppl.sample("z", ppl.dist.Normal(0.0 * x[0, 0], 1.0))
        model(ppl, x)

    for wrong, message in (
        (nested, "scan inside a scan"),
        (empty, r"one number of steps; found length None and first axes \[\]"),
        (uneven, r"one number of steps.*\[3, 2\]"),
        (twice, "Two sites are called 'z'"),
    ):
        with pytest.raises(ProgramError, match=message):
            engine(backend, wrong, guide)


def test_sequences_of_other_lengths_than_the_fits_are_asked_for() -> None:
    rng = np.random.default_rng(2)
    sequences = [rng.normal(size=t) for t in (2, 3, 5)]
    program = Program("chain", model, guide, portable=True, arguments=("x",))
    run = fit(program, data=sequences[:2], recipe="elbo", steps=1, dtype="float64", backend="pyro", compile="eager")
    for asked in (sequences, sequences[:1]):
        found = run.posterior(3, data=asked)
        assert found.values["z"].shape == (3, len(asked), max(map(len, asked)))
        for n, x in enumerate(asked):
            exact = norm.logpdf(x, found.values["z"][:, n, : len(x)], np.exp(-0.2)).sum(-1)
            np.testing.assert_allclose(found.log_likelihood["x"][:, n], exact, rtol=1e-12)
        assert run.log_likelihood(asked, draws=5).values.shape == (len(asked),)
    with pytest.raises(DataError, match=r"Rows of 'x' have shape \(4,\)"):
        run.log_likelihood(np.zeros((2, 4)))
