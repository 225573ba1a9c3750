"""Methods against posteriors that are known: conjugate Gaussians; constrained sites; what they refuse and lack."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyro
import pytest
import torch

from ppl_lvm import fit, program, recipe
from ppl_lvm.errors import DataError, LegalityError, PplLvmError, ProgramError, RecipeError
from ppl_lvm.report import difference_table, differences, measure, table
from ppl_lvm.sampled import Sampled

BACKENDS = ("pyro", "numpyro")
on_both = pytest.mark.parametrize("backend", BACKENDS)

X = np.array([1.2, -0.4, 2.0, 0.7, 0.3])
PRIOR, SPREAD, NOISE = 2.0, 1.0, 0.5

SOURCES = {
    # mu ~ N(0, 2), z_n ~ N(mu, 1), x_n ~ N(z_n, 0.5): Gaussian in (mu, z).
    "local": """
def model(ppl, x):
    mu = ppl.sample("mu", ppl.dist.Normal(0.0 * x[0], 2.0))
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.Normal(mu, 1.0))
        ppl.sample("x", ppl.dist.Normal(z, 0.5), obs=x)
""",
    # mu ~ N(0, 2), x_n ~ N(mu, 0.5).
    "shared": """
def model(ppl, x):
    mu = ppl.sample("mu", ppl.dist.Normal(0.0 * x[0], 2.0))
    with ppl.plate("data", len(x)):
        ppl.sample("x", ppl.dist.Normal(mu, 0.5), obs=x)
""",
    # rate ~ Gamma(3, 2), x_n ~ Exponential(rate): Gamma(3 + N, 2 + sum x).
    "rate": """
def model(ppl, x):
    rate = ppl.sample("rate", ppl.dist.Gamma(3.0 + 0.0 * x[0], 2.0))
    with ppl.plate("data", len(x)):
        ppl.sample("x", ppl.dist.Exponential(rate), obs=x)
""",
    # z_n ~ N(theta, 1), x_n ~ N(z_n, 0.5), theta a positive parameter.
    "learned": """
def model(ppl, x):
    theta = ppl.param("theta", 0.3, ppl.dist.constraints.positive)
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.Normal(theta, 1.0))
        ppl.sample("x", ppl.dist.Normal(z, 0.5), obs=x)
""",
    "discrete": """
def model(ppl, x):
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.Bernoulli(0.5 + 0.0 * x))
        ppl.sample("x", ppl.dist.Normal(z, 0.5), obs=x)
""",
    "subsampled": """
def model(ppl, x):
    mu = ppl.sample("mu", ppl.dist.Normal(0.0 * x[0], 2.0))
    with ppl.plate("data", len(x), subsample_size=2) as i:
        ppl.sample("x", ppl.dist.Normal(mu, 0.5), obs=x[i])
""",
    # Eight schools (Rubin 1981), not centred.
    "schools": """
def model(ppl, y, sigma):
    mu = ppl.sample("mu", ppl.dist.Normal(0.0 * y[0], 5.0))
    tau = ppl.sample("tau", ppl.dist.HalfCauchy(5.0 + 0.0 * y[0]))
    with ppl.plate("schools", len(y)):
        eta = ppl.sample("eta", ppl.dist.Normal(0.0 * y, 1.0))
        ppl.sample("y", ppl.dist.Normal(mu + tau * eta, sigma), obs=y)
""",
}
GUIDE = """
def guide(ppl, *data):
    raise RuntimeError("a method runs no guide")
"""


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    folder = tmp_path_factory.mktemp("programs")

    @cache
    def write(name: str) -> Any:
        path = Path(folder) / f"{name}.py"
        guide = GUIDE.replace("*data", "y, sigma" if name == "schools" else "x")
        path.write_text(f'"""A program."""\n{SOURCES[name]}\n{guide}')
        return program(path)

    return write


@pytest.fixture(scope="module")
def run(write: Callable[[str], Any]) -> Callable[..., Sampled]:
    """A fit, made once per combination."""

    @cache
    def run(name: str, method: str, backend: str, **options: Any) -> Sampled:
        found = fit(write(name), data=X if name != "rate" else np.abs(X), recipe=method, backend=backend,
                    dtype="float64", **{"seed": 1} | options)
        assert isinstance(found, Sampled)
        return found

    return run


def gaussian() -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of (mu, z_1 ... z_5) given X in program "local"."""
    n = len(X)
    precision = np.diag([1 / PRIOR**2 + n / SPREAD**2] + [1 / SPREAD**2 + 1 / NOISE**2] * n)
    precision[0, 1:] = precision[1:, 0] = -1 / SPREAD**2
    covariance = np.linalg.inv(precision)
    return covariance @ np.concatenate([[0.0], X / NOISE**2]), covariance


def log_evidence() -> float:
    """`log p(X)` of program "local"."""
    covariance = PRIOR**2 + (SPREAD**2 + NOISE**2) * np.eye(len(X))
    log_det = np.linalg.slogdet(covariance)[1]
    return float(-0.5 * (X @ np.linalg.solve(covariance, X) + log_det + len(X) * np.log(2 * np.pi)))


def draws_of(found: Sampled) -> np.ndarray:
    values = found.posterior(None).values
    return np.concatenate([values["mu"][:, None], values["z"]], 1)


@on_both
def test_map_is_the_mode_and_the_loss_its_density(run: Callable[..., Sampled], backend: str) -> None:
    found = run("local", "map", backend, steps=600)
    mean, covariance = gaussian()
    np.testing.assert_allclose(draws_of(found)[0], mean, atol=1e-5)
    # log p(x, z) = log p(x) + log p(z | x), and at its mode the latter is the Gaussian's normaliser.
    log_p = log_evidence() - 0.5 * np.linalg.slogdet(2 * np.pi * covariance)[1]
    np.testing.assert_allclose(found.history["loss"][-1], -log_p / len(X), rtol=1e-6)
    assert len(found.history["loss"]) == 600


@on_both
@pytest.mark.parametrize("density", ["constrained", "unconstrained"])
def test_map_says_whose_density_it_maximises(run: Callable[..., Sampled], backend: str, density: str) -> None:
    found = run("rate", "map", backend, steps=600, density=density)
    shape, rate = 3.0 + len(X), 2.0 + np.abs(X).sum()
    mode = (shape - 1) / rate if density == "constrained" else shape / rate
    np.testing.assert_allclose(found.posterior(None).values["rate"], [mode], rtol=1e-5)


@on_both
def test_map_learns_parameters_jointly(run: Callable[..., Sampled], backend: str) -> None:
    found = fit(run("learned", "map", backend, steps=5).program, data=X, recipe="map", backend=backend,
                dtype="float64", steps=600, params={"theta": 0.1, "guide.weight": 0.0})
    # theta = mean z and z_n = theta + w (x_n - theta) with w = 1 / (1 + 0.5^2), so theta = mean x.
    assert found.params.keys() == {"theta"}
    np.testing.assert_allclose(found.params["theta"], X.mean(), atol=1e-5)
    np.testing.assert_allclose(found.posterior(None).values["z"][0], X.mean() + 0.8 * (X - X.mean()), atol=1e-5)


@on_both
def test_laplace_is_exact_for_a_gaussian(run: Callable[..., Sampled], backend: str) -> None:
    found = run("local", "laplace", backend, steps=600)
    mean, covariance = gaussian()
    assert found._outcome.gaussian is not None
    loc, lower = found._outcome.gaussian
    np.testing.assert_allclose(loc, mean, atol=1e-5)
    np.testing.assert_allclose(lower @ lower.T, covariance, atol=1e-5)
    np.testing.assert_allclose(found.log_evidence(draws=7), log_evidence(), atol=1e-5)
    drawn = draws_of(found)
    assert drawn.shape == (1000, 6)
    error = np.sqrt(np.diag(covariance) / len(drawn))
    assert (np.abs(drawn.mean(0) - mean) < 4 * error).all()


@on_both
def test_laplace_of_a_gamma_is_that_of_its_logarithm(run: Callable[..., Sampled], backend: str) -> None:
    found = run("rate", "laplace", backend, steps=600)
    assert found._outcome.gaussian is not None
    loc, lower = found._outcome.gaussian
    shape, rate = 3.0 + len(X), 2.0 + np.abs(X).sum()
    # u = log rate has density exp(shape u - rate e^u), with curvature shape at its mode.
    np.testing.assert_allclose(loc, [np.log(shape / rate)], atol=1e-5)
    np.testing.assert_allclose(lower, [[shape**-0.5]], atol=1e-5)


@on_both
def test_nuts_has_the_posterior_within_its_standard_error(run: Callable[..., Sampled], backend: str) -> None:
    import arviz_stats  # noqa: F401 - gives DataTree its accessor

    found = run("local", "nuts", backend, warmup=150, draws=200, chains=2)
    mean, covariance = gaussian()
    drawn = draws_of(found)
    assert drawn.shape == (400, 6)
    sd = np.sqrt(np.diag(covariance))
    # Chains of a Gaussian mix as well as independent draws or better; half of the draws is a cautious count.
    error = sd / np.sqrt(len(drawn) / 2)
    assert (np.abs(drawn.mean(0) - mean) < 4 * error).all()
    assert (np.abs(drawn.std(0) - sd) < 4 * sd / np.sqrt(len(drawn))).all()
    assert 0.6 < found.stats["acceptance_rate"].mean() < 1.0
    assert not found.stats["diverging"].any()
    assert (found.stats["step_size"].std(1) == 0).all()
    assert found.stats["step_size"][0, 0] != found.stats["step_size"][1, 0]


@on_both
def test_svgd_moments(run: Callable[..., Sampled], backend: str) -> None:
    found = run("shared", "svgd", backend, steps=300, particles=10)
    variance = 1 / (1 / PRIOR**2 + len(X) / NOISE**2)
    mean = variance * X.sum() / NOISE**2
    mu = found.posterior(None).values["mu"]
    assert mu.shape == (10,)
    # Particles of a symmetric density stand symmetrically; their spread is right to a tenth in one dimension.
    np.testing.assert_allclose(mu.mean(), mean, atol=1e-3)
    np.testing.assert_allclose(mu.std(), np.sqrt(variance), rtol=0.1)
    assert found.history["force"][-1] < 0.01 * found.history["force"][0]


@on_both
def test_a_seed_is_the_draws(run: Callable[..., Sampled], backend: str) -> None:
    options: dict[str, Any] = {"warmup": 20, "draws": 10}
    first = run("shared", "nuts", backend, **options)
    again = fit(first.program, data=X, recipe="nuts", backend=backend, dtype="float64", seed=1, **options)
    other = fit(first.program, data=X, recipe="nuts", backend=backend, dtype="float64", seed=2, **options)
    mu = first.posterior(None).values["mu"]
    np.testing.assert_array_equal(mu, again.posterior(None).values["mu"])
    assert (mu != other.posterior(None).values["mu"]).all()
    for seed, same in ((0, True), (1, False)):
        assert np.array_equal(first.predictive(4, seed=0)["x"], first.predictive(4, seed=seed)["x"]) == same


@on_both
def test_settings_of_the_process_stay(run: Callable[..., Sampled], backend: str) -> None:
    pyro.get_param_store().clear()
    pyro.param("mine", torch.tensor(1.5))
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002 - the process's own generator is what is looked at

    def state() -> list[Any]:
        return [
            torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), torch.get_default_dtype(),  # type: ignore[index]
            jax.config.jax_enable_x64, {n: float(v) for n, v in pyro.get_param_store().items()},
            torch.distributions.Distribution._validate_args,
        ]

    before = state()
    for method, options in (("map", {"steps": 3}), ("svgd", {"steps": 3, "particles": 3}),
                            ("nuts", {"warmup": 5, "draws": 4}), ("laplace", {"steps": 50})):
        found = fit(run("learned", "map", backend, steps=5).program, data=X, recipe=method, backend=backend,
                    params={"theta": 0.1}, **options)
        found.predictive(2)
        found.posterior(2)
    assert state() == before
    pyro.get_param_store().clear()
