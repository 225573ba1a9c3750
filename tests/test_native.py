"""Native programs of both libraries, fitted as they are: global and local latents, networks, stores left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as numpyro_dist
import pyro
import pyro.distributions as pyro_dist
import pytest
import torch
from scipy.stats import multivariate_normal, norm
from torch.distributions import constraints

from ppl_lvm import Fit, fit
from ppl_lvm.errors import LegalityError, ProgramError

ROWS = 40
TAU, SIGMA, NOISE = 2.0, 0.7, 0.5
"""Scales of mu ~ Normal(0, TAU), z_n ~ Normal(mu, SIGMA), x_n ~ Normal(z_n, NOISE)."""


def data() -> np.ndarray:
    rng = np.random.default_rng(0)
    return 1.3 + rng.normal(scale=np.hypot(SIGMA, NOISE), size=ROWS)


def exact(x: np.ndarray) -> tuple[float, float, float]:
    """Log evidence, and posterior mean and standard deviation of mu."""
    covariance = TAU**2 * np.ones((len(x), len(x))) + (SIGMA**2 + NOISE**2) * np.eye(len(x))
    precision = 1 / TAU**2 + len(x) / (SIGMA**2 + NOISE**2)
    mean = x.sum() / (SIGMA**2 + NOISE**2) / precision
    return float(multivariate_normal(np.zeros(len(x)), covariance).logpdf(x)), float(mean), float(precision**-0.5)


def pyro_model(x: torch.Tensor) -> None:
    mu = pyro.sample("mu", pyro_dist.Normal(0.0, TAU))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", pyro_dist.Normal(mu, SIGMA))
        pyro.sample("x", pyro_dist.Normal(z, NOISE), obs=x)


def pyro_guide(x: torch.Tensor) -> None:
    loc = pyro.param("loc", torch.tensor(0.0))
    scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
    mu = pyro.sample("mu", pyro_dist.Normal(loc, scale))
    a, b = pyro.param("a", torch.tensor(0.1)), pyro.param("b", torch.tensor(0.1))
    s = pyro.param("s", lambda: torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        pyro.sample("z", pyro_dist.Normal(a * x + b * mu, s))


def numpyro_model(x: Any) -> None:
    mu = numpyro.sample("mu", numpyro_dist.Normal(0.0, TAU))
    with numpyro.plate("rows", len(x)):
        z = numpyro.sample("z", numpyro_dist.Normal(mu, SIGMA))
        numpyro.sample("x", numpyro_dist.Normal(z, NOISE), obs=x)


def numpyro_guide(x: Any) -> None:
    positive = numpyro_dist.constraints.positive
    loc, scale = numpyro.param("loc", 0.0), numpyro.param("scale", 1.0, constraint=positive)
    mu = numpyro.sample("mu", numpyro_dist.Normal(loc, scale))
    a, b = numpyro.param("a", 0.1), numpyro.param("b", lambda key: jnp.array(0.1))
    s = numpyro.param("s", 1.0, constraint=positive)
    with numpyro.plate("rows", len(x)):
        numpyro.sample("z", numpyro_dist.Normal(a * x + b * mu, s))


NATIVE: dict[str, tuple[Callable[..., None], Callable[..., None]]] = {
    "pyro": (pyro_model, pyro_guide),
    "numpyro": (numpyro_model, numpyro_guide),
}
on_both = pytest.mark.parametrize("library", sorted(NATIVE))


def assert_posterior(run: Fit, x: np.ndarray, tolerance: float, nats: float) -> None:
    log_evidence, mean, sd = exact(x)
    v = 1 / (1 / SIGMA**2 + 1 / NOISE**2)
    wanted = {"loc": mean, "scale": sd, "a": v / NOISE**2, "b": v / SIGMA**2, "s": v**0.5}
    for name, value in wanted.items():
        assert run.params[name] == pytest.approx(value, abs=tolerance), name
    # The family holds the exact posterior, where every draw of the bound is the log evidence.
    assert -run.history["loss"][-100:].mean() * len(x) == pytest.approx(log_evidence, abs=nats)


@pytest.mark.parametrize("recipe", ["elbo", "iwae"])
@on_both
def test_a_native_program_reaches_its_exact_posterior(library: str, recipe: str) -> None:
    """The backend is found. All sites doubly reparameterised (ELBO), the gradient's noise vanishes at the solution.

    Under IWAE the rows' latents are pathwise, whose noise does not vanish: parameters are good to a few hundredths.
    """
    x = data()
    model, guide = NATIVE[library]
    rate = {"schedule": "cosine", "start": 0.05, "end": 0.0, "steps": 1500}
    estimator = {"mu": "dreg", "z": "dreg"} if recipe == "elbo" else {"mu": "dreg", "z": "pathwise"}
    run = fit(
        model,
        guide,
        x,
        recipe,
        draws=1 if recipe == "elbo" else 3,
        estimator=estimator,
        learning_rate=rate,
        steps=1500,
        batch_size=None,
        dtype="float64",
    )
    assert run.backend == library
    if recipe == "elbo":
        assert_posterior(run, x, tolerance=2e-3, nats=0.01)
    else:
        assert_posterior(run, x, tolerance=0.05, nats=0.15)
    posterior = run.posterior(200)
    assert posterior.values["mu"].shape == (200,)
    assert posterior.values["z"].shape == (200, ROWS)
    assert posterior.dims["z"] == ("rows",)


@on_both
def test_mini_batches_of_a_native_program_are_scaled(library: str) -> None:
    """The mean of the mini-batch losses over one epoch at fixed parameters is the whole batch's, globals fixed."""
    x = data()
    model, guide = NATIVE[library]
    options: dict[str, Any] = {"recipe": "elbo", "learning_rate": 0.0, "dtype": "float64", "seed": 1}
    pieces = fit(model, guide, x, batch_size=10, steps=2000, **options)
    whole = fit(model, guide, x, batch_size=None, steps=2000, **options)
    a, b = pieces.history["loss"], whole.history["loss"]
    spread = np.hypot(a.std() / len(a) ** 0.5, b.std() / len(b) ** 0.5)
    assert abs(a.mean() - b.mean()) < 4 * spread
    assert a.std() > b.std()


def test_pyro_modules_are_fitted_functionally() -> None:
    """An encoder registered by pyro.module: neither the store nor the module's own weights change."""
    torch.manual_seed(0)
    encoder = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))

    def model(x: torch.Tensor) -> None:
        weight = pyro.param("weight", 0.1 * torch.ones(2, 3))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", pyro_dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", pyro_dist.Normal(z @ weight, 0.5).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("rows", len(x)):
            code = encoder(x)
            pyro.sample("z", pyro_dist.Normal(code[..., :2], code[..., 2:].exp()).to_event(1))

    pyro.clear_param_store()
    pyro.param("weight", torch.tensor(7.0))
    before = {n: p.detach().clone() for n, p in encoder.named_parameters()}
    x = np.random.default_rng(0).normal(size=(30, 3))
    options: dict[str, Any] = {"recipe": "elbo", "steps": 60, "batch_size": 10, "learning_rate": 0.02}
    runs = [fit(model, guide, x, compile=mode, **options) for mode in ("eager", "graph")]
    for name, parameter in encoder.named_parameters():
        assert torch.equal(parameter, before[name])
        fitted = [run.params[f"encoder$$${name}"] for run in runs]
        assert not np.allclose(fitted[0], before[name].numpy())
        np.testing.assert_allclose(fitted[0], fitted[1], rtol=1e-4, atol=1e-5)
    assert runs[0].history["loss"][-10:].mean() < runs[0].history["loss"][:10].mean()
    assert dict(pyro.get_param_store().items())["weight"].item() == 7.0
    assert set(pyro.get_param_store().keys()) == {"weight"}
    pyro.clear_param_store()


def test_a_module_that_is_only_read_is_fitted() -> None:
    linear = torch.nn.Linear(1, 1)
    before = linear.weight.item()

    def guide(x: torch.Tensor) -> None:
        pyro.module("linear", linear)
        mu = pyro.sample("mu", pyro_dist.Normal(linear.weight[0, 0], 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("z", pyro_dist.Normal(mu, 1.0))

    run = fit(pyro_model, guide, data(), "elbo", steps=10, learning_rate=0.1, estimator="pathwise")
    assert run.params["linear$$$weight"] > before + 0.3
    assert linear.weight.item() == before


def test_a_numpyro_autoguide_is_fitted_and_refused_where_it_has_no_density_per_row() -> None:
    x = data()
    options: dict[str, Any] = {"steps": 300, "learning_rate": 0.05, "batch_size": None}
    mean_field = numpyro.infer.autoguide.AutoNormal(numpyro_model)
    cooled = {**options, "learning_rate": {"schedule": "cosine", "start": 0.1, "end": 0.0, "steps": 300}}
    run = fit(numpyro_model, mean_field, x, "elbo", **cooled)
    # The best product of Gaussians to a Gaussian of this precision has the divergence `gap`.
    precision = np.diag([1 / TAU**2 + ROWS / SIGMA**2, *[1 / SIGMA**2 + 1 / NOISE**2] * ROWS])
    precision[0, 1:] = precision[1:, 0] = -1 / SIGMA**2
    gap = (np.log(np.diag(precision)).sum() - np.linalg.slogdet(precision)[1]) / 2
    assert run.history["loss"][-50:].mean() * len(x) == pytest.approx(gap - exact(x)[0], abs=0.5)
    joint = numpyro.infer.autoguide.AutoMultivariateNormal(numpyro_model)
    with pytest.raises(LegalityError, match="no density per row"):
        fit(numpyro_model, joint, x, "iwae", draws=3, **options)


def test_two_fits_in_one_process_do_not_meet() -> None:
    x = data()
    options: dict[str, Any] = {"recipe": "elbo", "steps": 5, "compile": "eager"}
    first = fit(pyro_model, pyro_guide, x, **options)
    fit(pyro_model, pyro_guide, x + 100.0, **options, seed=9)
    again = fit(pyro_model, pyro_guide, x, **options)
    for name, value in first.params.items():
        np.testing.assert_array_equal(value, again.params[name])


@on_both
def test_a_latent_that_only_one_side_has_is_refused(library: str) -> None:
    model, guide = NATIVE[library]
    with pytest.raises(ProgramError, match=r"'mu' is in the model but not in the guide"):
        fit(model, _without_mu(library), data(), "elbo", steps=1)
    with pytest.raises(ProgramError, match=r"'mu' is not in the model"):
        fit(_without_mu(library, model=True), guide, data(), "elbo", steps=1)


def _without_mu(library: str, model: bool = False) -> Callable[..., None]:
    def in_pyro(x: torch.Tensor) -> None:
        scale = pyro.param("only", torch.tensor(1.0))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", pyro_dist.Normal(0.0, scale))
            if model:
                pyro.sample("x", pyro_dist.Normal(z, NOISE), obs=x)

    def in_numpyro(x: Any) -> None:
        scale = numpyro.param("only", 1.0)
        with numpyro.plate("rows", len(x)):
            z = numpyro.sample("z", numpyro_dist.Normal(0.0, scale))
            if model:
                numpyro.sample("x", numpyro_dist.Normal(z, NOISE), obs=x)

    return in_pyro if library == "pyro" else in_numpyro


@on_both
def test_auxiliary_guide_sites_count_in_the_guides_density(library: str) -> None:
    """u is drawn and then z is a function of it: log q(z) is that of u with the Jacobian, or the bound is wrong."""

    def pyro_change(x: torch.Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.4))
        u = pyro.sample("u", pyro_dist.Normal(loc, 0.5), infer={"is_auxiliary": True})
        pyro.sample("mu", pyro_dist.Delta(3.0 * u, log_density=-torch.log(torch.tensor(3.0))))
        with pyro.plate("rows", len(x)):
            pyro.sample("z", pyro_dist.Normal(x, 0.5))

    def numpyro_change(x: Any) -> None:
        loc = numpyro.param("loc", 0.4)
        u = numpyro.sample("u", numpyro_dist.Normal(loc, 0.5), infer={"is_auxiliary": True})
        numpyro.sample("mu", numpyro_dist.Delta(3.0 * u, log_density=-jnp.log(3.0)))
        with numpyro.plate("rows", len(x)):
            numpyro.sample("z", numpyro_dist.Normal(x, 0.5))

    def pyro_direct(x: torch.Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.4))
        pyro.sample("mu", pyro_dist.Normal(3.0 * loc, 1.5))
        with pyro.plate("rows", len(x)):
            pyro.sample("z", pyro_dist.Normal(x, 0.5))

    def numpyro_direct(x: Any) -> None:
        loc = numpyro.param("loc", 0.4)
        numpyro.sample("mu", numpyro_dist.Normal(3.0 * loc, 1.5))
        with numpyro.plate("rows", len(x)):
            numpyro.sample("z", numpyro_dist.Normal(x, 0.5))

    guides = {"pyro": (pyro_change, pyro_direct), "numpyro": (numpyro_change, numpyro_direct)}[library]
    options: dict[str, Any] = {"recipe": "elbo", "steps": 4000, "learning_rate": 0.0, "dtype": "float64"}
    losses = [fit(NATIVE[library][0], g, data(), batch_size=None, **options).history["loss"] for g in guides]
    spread = np.hypot(*(h.std() / len(h) ** 0.5 for h in losses))
    assert abs(losses[0].mean() - losses[1].mean()) < 4 * spread
    assert spread < 0.02 * np.log(3.0) * 10


@on_both
def test_a_site_on_two_levels_is_refused_for_row_wise_bounds(library: str) -> None:
    """The guide draws z once for all rows where the model draws it for each: no density per row exists."""

    def pyro_shared(x: torch.Tensor) -> None:
        pyro.sample("mu", pyro_dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))
        pyro.sample("z", pyro_dist.Normal(x, 1.0).to_event(1))

    def numpyro_shared(x: Any) -> None:
        numpyro.sample("mu", numpyro_dist.Normal(numpyro.param("loc", 0.0), 1.0))
        numpyro.sample("z", numpyro_dist.Normal(x, 1.0).to_event(1))

    guide = pyro_shared if library == "pyro" else numpyro_shared
    with pytest.raises(LegalityError, match="no density per row"):
        fit(NATIVE[library][0], guide, data(), "iwae", draws=2, steps=1, batch_size=None)
    with pytest.raises(LegalityError, match="mini-batches"):
        fit(NATIVE[library][0], guide, data(), "elbo", steps=1, batch_size=10)


def pyro_pair(x: torch.Tensor) -> None:
    with pyro.plate("rows", len(x)):
        k = pyro.sample("k", pyro_dist.Categorical(torch.tensor([0.3, 0.7], dtype=x.dtype)))
        pyro.sample("x", pyro_dist.Normal(2.0 * k, 1.0), obs=x)


def numpyro_pair(x: Any) -> None:
    with numpyro.plate("rows", len(x)):
        k = numpyro.sample("k", numpyro_dist.Categorical(jnp.array([0.3, 0.7])))
        numpyro.sample("x", numpyro_dist.Normal(2.0 * k, 1.0), obs=x)


@on_both
def test_a_family_gives_a_discrete_site_the_exact_posterior(library: str) -> None:
    """Free logits of every row hold it; summed out, the bound is then the log evidence."""
    x = np.array([-1.0, 0.5, 1.2, 3.0])
    model = {"pyro": pyro_pair, "numpyro": numpyro_pair}[library]
    run = fit(
        *(model, "auto_normal", x, "elbo"),
        estimator={"k": "enumerate"},
        batch_size=None,
        steps=400,
        learning_rate=0.1,
        dtype="float64",
    )
    evidence = np.log(0.3 * norm.pdf(x) + 0.7 * norm.pdf(x - 2.0))
    assert -run.history["loss"][-1] == pytest.approx(evidence.mean(), abs=1e-6)
