"""What a fit says about rows, against linear Gaussian programs whose answers are known, on both backends."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import ppl_lvm.fitted
from ppl_lvm import backends
from ppl_lvm.backends.base import Call
from ppl_lvm.errors import DataError, PplLvmError, ProgramError
from ppl_lvm.posterior import Fit, State
from ppl_lvm.predict import pick
from ppl_lvm.program import Program
from ppl_lvm.recipe import recipe

BACKENDS = ("numpyro", "pyro")
DRAWS = 4000


def as_fit(backend: str, model: Any, guide: Any, arguments: tuple[str, ...], *data: np.ndarray) -> Fit:
    """A fit whose parameters are the program's initial ones."""
    program = Program(model.__name__, model, guide, portable=True, arguments=arguments)
    call = Call(data)
    bound = backends.load(backend).Bound(program, call, seed=0, dtype="float64")
    return Fit(
        program=program,
        recipe=recipe("elbo"),
        backend=backend,
        seed=0,
        params={},
        history={},
        seconds=0.0,
        messages=[],
        state=State(backend, 0, 0, "eager", {}),
        _bound=bound,
        _trained=bound.initial,
        _data=call,
    )


def normal(x: Any, mean: Any, sd: float) -> np.ndarray:
    return np.asarray(-0.5 * ((x - mean) / sd) ** 2 - np.log(sd * np.sqrt(2 * np.pi)))


# A confounder u of a treatment t and an outcome y, and a proxy w of u that t does not reach.

A, B, C, D = 0.8, 1.5, -1.2, 0.7
ST, SY, SW = 0.6, 0.5, 0.4
PRECISION = 1 + A**2 / ST**2 + C**2 / SY**2 + D**2 / SW**2
TREATED = np.random.default_rng(3).normal(size=(3, 5)) * np.array([[1.0], [2.0], [0.8]])


def scm_model(ppl: Any, t: Any, y: Any, w: Any) -> None:
    a, b, c, d = (ppl.param(name, value) for name, value in (("a", A), ("b", B), ("c", C), ("d", D)))
    with ppl.plate("people", len(t)):
        u = ppl.sample("u", ppl.dist.Normal(0.0 * a, 1.0))
        t = ppl.sample("t", ppl.dist.Normal(a * u, ST), obs=t)
        ppl.sample("y", ppl.dist.Normal(b * t + c * u, SY), obs=y)
        ppl.sample("w", ppl.dist.Normal(d * u, SW), obs=w)


def scm_guide(ppl: Any, t: Any, y: Any, w: Any) -> None:
    """The exact posterior of u."""
    a, b, c, d = (ppl.param(name, value) for name, value in (("a", A), ("b", B), ("c", C), ("d", D)))
    mean = (a * t / ST**2 + c * (y - b * t) / SY**2 + d * w / SW**2) / PRECISION
    with ppl.plate("people", len(t)):
        ppl.sample("u", ppl.dist.Normal(mean, PRECISION**-0.5))


def scm_wide_guide(ppl: Any, t: Any, y: Any, w: Any) -> None:
    """Around the same mean, and wide enough for what the posterior is without y."""
    a, b, c, d = (ppl.param(name, value) for name, value in (("a", A), ("b", B), ("c", C), ("d", D)))
    mean = (a * t / ST**2 + c * (y - b * t) / SY**2 + d * w / SW**2) / PRECISION
    with ppl.plate("people", len(t)):
        ppl.sample("u", ppl.dist.Normal(mean, 1.0))


def abducted(t: np.ndarray, y: np.ndarray, w: np.ndarray) -> np.ndarray:
    return (A * t / ST**2 + C * (y - B * t) / SY**2 + D * w / SW**2) / PRECISION


# A global mean under rows with a latent each; every guide is the exact posterior, so weights are constant.

SG, SZ, SX = 1.3, 0.9, 0.7
ROWS = 11
X = np.random.default_rng(5).normal(0.6, 1.2, size=ROWS)
G_PRECISION = 1 / SG**2 + ROWS / (SZ**2 + SX**2)
G_MEAN = X.sum() / (SZ**2 + SX**2) / G_PRECISION
GAIN = SZ**2 / (SZ**2 + SX**2)
Z_SD = SZ * SX / np.sqrt(SZ**2 + SX**2)


def shared_model(ppl: Any, x: Any) -> None:
    scale = ppl.param("scale", SG)
    g = ppl.sample("g", ppl.dist.Normal(0.0 * scale, scale))
    with ppl.plate("rows", len(x)):
        z = ppl.sample("z", ppl.dist.Normal(g, SZ))
        ppl.sample("x", ppl.dist.Normal(z, SX), obs=x)


def shared_guide(ppl: Any, x: Any) -> None:
    loc = ppl.param("loc", G_MEAN)
    g = ppl.sample("g", ppl.dist.Normal(loc, G_PRECISION**-0.5))
    with ppl.plate("rows", len(x)):
        ppl.sample("z", ppl.dist.Normal(g + GAIN * (x - g), Z_SD))


def wide_shared_guide(ppl: Any, x: Any) -> None:
    """Off for g, and wide enough for what the posterior of z is without x."""
    loc = ppl.param("loc", G_MEAN)
    g = ppl.sample("g", ppl.dist.Normal(loc + 0.1, 1.2 * G_PRECISION**-0.5))
    with ppl.plate("rows", len(x)):
        ppl.sample("z", ppl.dist.Normal(g + GAIN * (x - g), 1.7 * Z_SD))


# Plates inside the data plate, an event, and a covariate.

FEATURES = np.arange(12.0).reshape(4, 3)
COVARIATE = np.array([[1.0], [2.0], [3.0], [4.0]])


def nested_model(ppl: Any, x: Any, size: Any) -> None:
    unit = ppl.param("unit", 1.0)
    with ppl.plate("pupils", len(x), dim=-2):
        z = ppl.sample("z", ppl.dist.Normal(size * unit, 1.0))
        with ppl.plate("items", 3, dim=-1):
            ppl.sample("e", ppl.dist.Normal(z, unit))
            ppl.sample("x", ppl.dist.Normal(z, unit), obs=x)


def nested_guide(ppl: Any, x: Any, size: Any) -> None:
    unit = ppl.param("unit", 1.0)
    with ppl.plate("pupils", len(x), dim=-2):
        z = ppl.sample("z", ppl.dist.Normal(size * unit, 1.0))
        with ppl.plate("items", 3, dim=-1):
            ppl.sample("e", ppl.dist.Normal(z, unit))


MADE: dict[tuple[str, str], Fit] = {}
PROGRAMS: dict[str, Callable[[str], Fit]] = {
    "scm": lambda backend: as_fit(backend, scm_model, scm_guide, ("t", "y", "w"), *TREATED),
    "shared": lambda backend: as_fit(backend, shared_model, shared_guide, ("x",), X),
    "scm_wide": lambda backend: as_fit(backend, scm_model, scm_wide_guide, ("t", "y", "w"), *TREATED),
    "shared_wide": lambda backend: as_fit(backend, shared_model, wide_shared_guide, ("x",), X),
    "nested": lambda backend: as_fit(backend, nested_model, nested_guide, ("x", "size"), FEATURES, COVARIATE),
}


def maker(backend: str) -> Callable[[str], Fit]:
    """One fit per program and backend, as nothing that is asked of it changes it."""

    def made(name: str) -> Fit:
        key = name, backend
        if key not in MADE:
            MADE[key] = PROGRAMS[name](backend)
        return MADE[key]

    return made


@pytest.fixture(params=BACKENDS)
def make(request: pytest.FixtureRequest) -> Callable[[str], Fit]:
    return maker(request.param)


SLOW_BACKENDS = (pytest.param("numpyro", marks=pytest.mark.slow), "pyro")
"""Where the backends share all code that is tested but runs that take long to compile."""


@pytest.fixture(params=SLOW_BACKENDS)
def make_slowly(request: pytest.FixtureRequest) -> Callable[[str], Fit]:
    return maker(request.param)


def assert_moments(draws: np.ndarray, mean: Any, sd: float) -> None:
    """Mean and standard deviation over the first axis within five standard errors."""
    n = len(draws)
    np.testing.assert_allclose(draws.mean(0), np.broadcast_to(mean, draws.shape[1:]), atol=5 * sd / n**0.5)
    np.testing.assert_allclose(draws.std(0), sd, atol=5 * sd / (2 * n) ** 0.5)


# Interventions.


def test_do_cuts_the_density_of_what_it_sets(make: Any) -> None:
    """`E[y | do(t)] = B t`, where seeing t would add `C E[u | t]`."""
    made = make("scm").do({"t": 2.0}, rows=5, draws=DRAWS)
    assert (made["t"] == 2.0).all()
    assert made["y"].shape == (DRAWS, 5)
    assert_moments(made["u"], 0.0, 1.0)
    assert_moments(made["y"], B * 2.0, np.hypot(C, SY))
    assert_moments(made["w"], 0.0, np.hypot(D, SW))
    assert_moments(made["y"] - C * made["u"], B * 2.0, SY)


def test_a_counterfactual_keeps_what_the_intervention_does_not_reach(make: Any) -> None:
    t, y, w = TREATED
    wanted = np.linspace(-1.0, 1.0, 5)
    made = make("scm").do({"t": wanted}, data=(t, y, w), draws=DRAWS)
    np.testing.assert_array_equal(made["t"], np.tile(wanted, (DRAWS, 1)))
    np.testing.assert_array_equal(made["w"], np.tile(w, (DRAWS, 1)))
    u = abducted(t, y, w)
    assert_moments(made["u"], u, PRECISION**-0.5)
    assert_moments(made["y"], B * wanted + C * u, np.sqrt(C**2 / PRECISION + SY**2))


def test_a_latent_below_the_intervention_is_drawn_anew(make: Any) -> None:
    """do(g) in a fit with rows: z follows g although the guide had inferred it, and x follows z."""
    made = make("shared").do({"g": 4.0}, data=X, draws=DRAWS)
    assert made["g"].shape == (DRAWS,) and (made["g"] == 4.0).all()
    assert_moments(made["z"], 4.0, SZ)
    assert_moments(made["x"], 4.0, np.hypot(SZ, SX))


def centred_model(ppl: Any, t: Any, y: Any) -> None:
    unit = ppl.param("unit", 1.0)
    with ppl.plate("people", len(t)):
        u = ppl.sample("u", ppl.dist.Normal(0.0 * unit, 1.0))
        t = ppl.sample("t", ppl.dist.Normal(u, unit), obs=t)
        ppl.sample("y", ppl.dist.Normal(t - t.mean(), 1e-9), obs=y)


def centred_guide(ppl: Any, t: Any, y: Any) -> None:
    unit = ppl.param("unit", 1.0)
    with ppl.plate("people", len(t)):
        ppl.sample("u", ppl.dist.Normal(0.0 * unit, 1.0))


@pytest.mark.parametrize("backend", SLOW_BACKENDS)
def test_a_program_that_reduces_new_draws_over_rows_is_run_draw_by_draw(backend: str) -> None:
    """`t.mean()` over all axes would be a mean over draws too."""
    run = as_fit(backend, centred_model, centred_guide, ("t", "y"), np.arange(4.0), np.zeros(4))
    made = run.do({"u": 1.0}, rows=4, draws=3)
    np.testing.assert_allclose(made["y"], made["t"] - made["t"].mean(1, keepdims=True), atol=1e-7)


# Conditions and codes.


def test_conditional_is_exact_without_free_ancestors_and_weighted_with(make: Any) -> None:
    run = make("scm")
    exact = run.conditional({"u": 0.5}, rows=5, draws=DRAWS)
    assert_moments(exact.values["y"], B * A * 0.5 + C * 0.5, np.hypot(B * ST, SY))
    seen = run.conditional({"t": 1.0}, rows=5, draws=DRAWS, particles=DRAWS)
    variance = 1 / (1 + A**2 / ST**2)
    u = variance * A / ST**2
    # Picked draws are as good as the fewer of picked and effective ones.
    n = min(DRAWS, seen.ess.min()) / 2
    sd = np.sqrt(C**2 * variance + SY**2)
    np.testing.assert_allclose(seen.values["u"].mean(0), u, atol=5 * np.sqrt(variance / n))
    np.testing.assert_allclose(seen.values["y"].mean(0), B + C * u, atol=5 * sd / np.sqrt(n))
    np.testing.assert_allclose(seen.values["y"].std(0), sd, atol=5 * sd / np.sqrt(2 * n))
    assert (seen.values["t"] == 1.0).all() and (seen.ess > 1).all() and (seen.ess < DRAWS).all()


def test_encode_and_decode(make: Any) -> None:
    run = make("scm")
    codes = run.encode(draws=DRAWS)
    sd = PRECISION**-0.5
    np.testing.assert_allclose(codes.mean["u"], abducted(*TREATED), atol=5 * sd / DRAWS**0.5)
    np.testing.assert_allclose(codes.sd["u"], sd, atol=5 * sd / (2 * DRAWS) ** 0.5)
    u, t = np.linspace(-1, 1, 5), np.linspace(0, 1, 5)
    # Values of an observed site feed the sites below it, so the mean of y is exact.
    np.testing.assert_allclose(run.decode({"u": u, "t": t})["y"], (B * t + C * u)[None], rtol=1e-12)
    np.testing.assert_allclose(run.decode({"u": u})["t"], (A * u)[None], rtol=1e-12)
    assert_moments(run.decode({"u": u}, draws=DRAWS, mean=False)["w"], D * u, SW)


def test_active_units_take_the_noise_of_the_mean_off(make_slowly: Any) -> None:
    assert make_slowly("scm").active_units(threshold=abducted(*TREATED).var() * 0.5, draws=DRAWS) == {"u": 1}
    assert make_slowly("scm").active_units(threshold=abducted(*TREATED).var() * 1.5, draws=DRAWS) == {"u": 0}


def test_impute_draws_what_is_missing_given_what_is_seen(make: Any) -> None:
    """The guide takes a missing y for zero; the weights put that right."""
    run = make("scm_wide")
    t, y, w = (a.copy() for a in TREATED)
    y[[1, 3]] = np.nan
    made = run.impute((t, y, w), draws=DRAWS, particles=DRAWS)
    for name, given in (("t", t), ("w", w)):
        np.testing.assert_array_equal(made.values[name], np.tile(given, (DRAWS, 1)))
    kept = [0, 2, 4]
    np.testing.assert_array_equal(made.values["y"][:, kept], np.tile(y[kept], (DRAWS, 1)))
    np.testing.assert_allclose(make("scm").impute(tuple(TREATED), 2, 50).ess, 50, rtol=1e-9)
    precision = 1 + A**2 / ST**2 + D**2 / SW**2
    u = (A * t / ST**2 + D * w / SW**2) / precision
    sd = np.sqrt(C**2 / precision + SY**2)
    for row in (1, 3):
        n = min(DRAWS, made.ess[row]) / 2
        assert n > 100
        assert made.values["y"][:, row].mean() == pytest.approx(B * t[row] + C * u[row], abs=5 * sd / n**0.5)
        assert made.values["y"][:, row].std() == pytest.approx(sd, abs=5 * sd / (2 * n) ** 0.5)


def test_impute_under_a_global(make_slowly: Any) -> None:
    """A missing row of x is drawn from its predictive under q(g)."""
    x = X.copy()
    x[2] = np.nan
    made = make_slowly("shared_wide").impute(x, draws=1000, particles=100)
    sd = np.sqrt(1.2**2 / G_PRECISION + SZ**2 + SX**2)
    assert made.values["x"].shape == (1000, ROWS)
    assert made.values["x"][:, 2].mean() == pytest.approx(G_MEAN + 0.1, abs=5 * sd / 1000**0.5)
    assert made.values["x"][:, 2].std() == pytest.approx(sd, abs=5 * sd / 2000**0.5)


def test_picks_are_in_proportion_to_the_weights() -> None:
    log_w = np.log(np.array([[[0.5, 0.0], [0.25, 1.0], [0.25, 0.0]]]) + 1e-300)
    index, ess = pick(log_w, 20_000, np.random.default_rng(0))
    assert index.shape == (1, 20_000, 2) and (index[0, :, 1] == 1).all()
    np.testing.assert_allclose(np.bincount(index[0, :, 0]) / 20_000, [0.5, 0.25, 0.25], atol=0.02)
    np.testing.assert_allclose(ess, [[1 / 0.375, 1.0]])
    with pytest.raises(DataError, match=r"rows \[8\]"):
        pick(np.full((1, 3, 1), -np.inf), 1, np.random.default_rng(0), first=8)


# Globals: one draw of them for all rows, in whatever blocks; densities that include them.


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows a block, two at the end, and chunks of a few draws that differ from block to block."""
    monkeypatch.setattr(ppl_lvm.fitted, "ENTRIES", 16 * 3)
    for module in ("ppl_lvm.posterior", "ppl_lvm.predict"):
        monkeypatch.setattr(f"{module}.ENTRIES", 16)
    monkeypatch.setattr("ppl_lvm.posterior.CHUNK", 64)


def test_rows_of_a_draw_share_its_globals_across_blocks(make: Any, blocks: None) -> None:
    run = make("shared")
    found = run.posterior(7)
    g, z = found.values["g"], found.values["z"]
    assert g.shape == (7,) and z.shape == (7, ROWS) and len(np.unique(z)) == 7 * ROWS
    np.testing.assert_allclose(found.log_p, normal(z, g[:, None], SZ) + normal(X, z, SX), rtol=1e-10)
    np.testing.assert_allclose(found.log_q, normal(z, g[:, None] + GAIN * (X - g[:, None]), Z_SD), rtol=1e-10)
    np.testing.assert_allclose(found.log_p_global, normal(g, 0.0, SG), rtol=1e-10)
    np.testing.assert_allclose(found.log_q_global, normal(g, G_MEAN, G_PRECISION**-0.5), rtol=1e-10)
    covariance = (SZ**2 + SX**2) * np.eye(ROWS) + SG**2
    evidence = -0.5 * (X @ np.linalg.solve(covariance, X) + np.linalg.slogdet(2 * np.pi * covariance)[1])
    # Guide and posterior are the same, so every draw of all rows and the global weighs as much as the data.
    np.testing.assert_allclose(found.log_weight, evidence, rtol=1e-10)
    np.testing.assert_allclose(run.pointwise(7, particles=2), normal(X, g[:, None], np.hypot(SZ, SX)), rtol=1e-10)


def test_noise_of_the_globals_is_not_that_of_the_rows(make_slowly: Any) -> None:
    """One stream of random numbers, begun again for the rows, would draw both from the same ones."""
    found = make_slowly("shared").posterior(DRAWS)
    g = (found.values["g"] - G_MEAN) * G_PRECISION**0.5
    z = (found.values["z"] - (found.values["g"][:, None] * (1 - GAIN) + GAIN * X)) / Z_SD
    assert_moments(g, 0.0, 1.0)
    assert_moments(z, 0.0, 1.0)
    correlation = (g[:, None] * z).mean(0)
    np.testing.assert_allclose(correlation, 0.0, atol=5 / DRAWS**0.5)


def test_predictions_share_globals_and_not_noise_across_blocks(make_slowly: Any, blocks: None) -> None:
    """`cov(x_i, x_j)` of two new rows is `Var(g)` and what the guide of z adds, whichever blocks they are in."""
    drawn = make_slowly("shared").predictive(60)["x"]
    assert drawn.shape == (60, ROWS) and len(np.unique(drawn)) == drawn.size
    prior = make_slowly("shared").prior_predictive(ROWS)
    assert prior["g"].shape == () and prior["z"].shape == (ROWS,)
    assert abs(prior["z"].mean() - prior["g"]) < 5 * SZ / ROWS**0.5


@pytest.mark.parametrize("name", ["shared", "shared_wide"])
def test_loo_equals_the_exact_leave_one_out_density(make_slowly: Any, name: str) -> None:
    """Without row n, g is normal around the others' mean, and x_n around g; also from a guide that is off."""
    noise = SZ**2 + SX**2
    precision = 1 / SG**2 + (ROWS - 1) / noise
    exact = normal(X, (X.sum() - X) / noise / precision, np.sqrt(1 / precision + noise).item())
    found = make_slowly(name).loo(DRAWS, particles=50)
    ll = make_slowly(name).pointwise(DRAWS, particles=50)
    g = make_slowly(name).posterior(DRAWS)
    assert g.log_p_global is not None and g.log_q_global is not None
    log_r = (g.log_p_global + ll.sum(1) - g.log_q_global)[:, None] - ll
    r = np.exp(log_r - log_r.max(0))
    error = (r * (np.exp(ll) - np.exp(exact))).std(0) / r.mean(0) / DRAWS**0.5 / np.exp(exact)
    assert (np.abs(found.elpd_i.values - exact) < 5 * error + 1e-4).all()


def test_loo_is_refused_without_globals(make: Any) -> None:
    with pytest.raises(ProgramError, match=r"Leave-one-out needs latents that all rows share.*log_likelihood"):
        make("scm").loo()
    with pytest.raises(ProgramError, match="none"):
        make("scm").pointwise(3)


# Without the training rows, and on other ones.


def test_nothing_needs_the_training_rows(make: Any) -> None:
    run = make("scm").without_data()
    data = tuple(TREATED)
    whole = make("scm")
    np.testing.assert_array_equal(run.posterior(3, data).values["u"], whole.posterior(3).values["u"])
    np.testing.assert_array_equal(run.predictive(3, data)["y"], whole.predictive(3)["y"])
    np.testing.assert_array_equal(run.log_likelihood(data, 3).values, whole.log_likelihood(draws=3).values)
    assert run.prior_predictive(5)["y"].shape == (5,)
    for ask in (run.posterior, run.predictive, run.encode, run.log_likelihood, run.to_arviz):
        with pytest.raises(DataError, match="holds no training rows"):
            ask()


def test_data_by_name_are_the_same_rows(make_slowly: Any) -> None:
    run = make_slowly("scm")
    named = dict(zip(("w", "y", "t"), TREATED[::-1], strict=True))
    np.testing.assert_allclose(run.log_likelihood(named, 3).values, run.log_likelihood(draws=3).values, rtol=1e-12)


# Plates inside the rows, covariates.


def test_inner_plates_and_covariates(make_slowly: Any) -> None:
    run = make_slowly("nested")
    found = run.posterior(4)
    assert found.values["z"].shape == (4, 4) and found.dims["z"] == ("pupils",)
    assert found.values["e"].shape == (4, 4, 3) and found.dims["e"] == ("pupils", "items")
    assert run.predictive(4)["x"].shape == (4, 4, 3)
    z = np.array([1.0, -2.0, 0.5, 3.0])
    decoded = run.decode({"z": z}, data=(FEATURES, COVARIATE))["x"]
    np.testing.assert_array_equal(decoded, np.tile(z[:, None], (1, 1, 3)))
    with pytest.raises(ProgramError, match=r"Sites \['z'\] look at the data \['size'\]; pass data="):
        run.decode({"x": np.zeros((4, 3))})
    np.testing.assert_array_equal(run.do({"z": z}, data=(FEATURES, COVARIATE), draws=2)["z"], np.tile(z, (2, 1)))
    tree = run.to_arviz(4, prior=2)
    assert tree["posterior"]["e"].dims == ("chain", "draw", "pupils", "items")
    assert tree["posterior_predictive"]["x"].dims == ("chain", "draw", "pupils", "items")
    assert tree["observed_data"]["x"].dims == ("pupils", "items")
    assert set(tree["constant_data"].data_vars) == {"size"}
    assert set(tree["prior"].data_vars) == {"z", "e"} and set(tree["prior_predictive"].data_vars) == {"x"}


# What is asked wrongly.


@pytest.mark.parametrize(
    ("ask", "kind", "message"),
    [
        (lambda run: run.do({"treatment": 1.0}), DataError, r"no site 'treatment'.*Sites: t, u, w, y"),
        (lambda run: run.do({"uu": 1.0}), DataError, "Did you mean 'u'"),
        (lambda run: run.do({"u": np.zeros((2, 3))}), DataError, r"shape \(2, 3\); a value has \(\)"),
        (lambda run: run.do({"u": np.zeros(4)}, data=tuple(TREATED)), DataError, r"one for each of 5 rows \(5,\)"),
        (lambda run: run.do({"u": np.zeros(4), "t": np.zeros(3)}), DataError, "different numbers of rows"),
        (lambda run: run.do({"u": 0.0}, rows=0), DataError, "rows = 0"),
        (lambda run: run.do({"u": 0.0}, data=tuple(TREATED), rows=3), DataError, "rows = 3, and the data have 5"),
        (lambda run: run.do({"u": np.nan}), DataError, "finite"),
        (lambda run: run.encode(TREATED[0]), PplLvmError, "needs data for 'y', 'w'; given were 't'"),
        (lambda run: run.predictive(0), DataError, "draws = 0"),
        (lambda run: run.posterior(-1), DataError, "draws = -1"),
        (lambda run: run.conditional({"t": 0.0}, particles=0), DataError, "particles = 0"),
        (lambda run: run.predictive(1, tuple(a[:0] for a in TREATED)), DataError, "no rows"),
        (lambda run: run.predictive(1, (*TREATED[:2], TREATED[2][:3])), DataError, "share their first axis"),
        (lambda run: run.predictive(1, (TREATED[0] * np.nan, *TREATED[1:])), DataError, r"'t' holds NaN .*impute them"),
        (lambda run: run.impute((TREATED[0] * np.nan, *TREATED[1:])), ProgramError, r"distribution of \['y'\] looks"),
    ],
)
def test_what_is_asked_wrongly_is_refused(ask: Callable[[Fit], object], kind: type[PplLvmError], message: str) -> None:
    with pytest.raises(kind, match=message):
        ask(maker("pyro")("scm"))


def coin_model(ppl: Any, x: Any) -> None:
    level = ppl.param("level", 0.5)
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.Bernoulli(logits=level))
        ppl.sample("x", ppl.dist.Gamma(1.0 + z, level), obs=x)


def coin_guide(ppl: Any, x: Any) -> None:
    level = ppl.param("level", 0.5)
    with ppl.plate("data", len(x)):
        ppl.sample("z", ppl.dist.Bernoulli(logits=level))


@pytest.mark.parametrize("backend", SLOW_BACKENDS)
def test_values_that_a_site_cannot_take_are_refused(backend: str) -> None:
    run = as_fit(backend, coin_model, coin_guide, ("x",), np.ones(3))
    with pytest.raises(DataError, match="'z' is discrete"):
        run.do({"z": 0.5})
    with pytest.raises(DataError, match="'z' from 2 to 2 are outside the support"):
        run.do({"z": 2})
    with pytest.raises(DataError, match="'x' from -1 to -1 are outside"):
        run.conditional({"x": -1.0})
    made = run.do({"z": 1}, rows=3, draws=3)
    assert (made["z"] == 1).all() and (made["x"] > 0).all()


def test_a_program_that_subsamples_itself_is_refused() -> None:
    from toys import native_rows

    model, guide = native_rows("pyro", subsample_size=4)
    program = Program.from_callables(model, guide)
    x = np.linspace(-1.0, 1.0, 8)
    bound = backends.load("pyro").Bound(program, Call((x,)), seed=0, dtype="float64")
    run = as_fit("pyro", scm_model, scm_guide, ("t", "y", "w"), *TREATED)
    run.program, run._fitted.program, run._fitted.bound = program, program, bound
    run._data = run._fitted.example = Call((x,))
    for ask in (run.predictive, run.posterior, run.encode):
        with pytest.raises(ProgramError, match="subsamples plate 'data' itself"):
            ask(draws=2)
