"""The programs in models/ on both backends: shapes, gradients, and what is known in closed form."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy.special import expit, log_expit, logsumexp
from scipy.stats import multivariate_normal, norm, poisson

from ppl_lvm import fit, legality
from ppl_lvm.algorithm import Objective
from ppl_lvm.backends.base import Call
from ppl_lvm.backends.numpyro import NumPyroBound, precision
from ppl_lvm.backends.pyro import PyroBound
from ppl_lvm.backends.structure import Plan
from ppl_lvm.catalogue import resolve
from ppl_lvm.objectives.elbo import elbo
from ppl_lvm.program import program, programs

Arrays = dict[str, np.ndarray]
BACKENDS = ["pyro", "numpyro"]
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "vae": {"z": (2, 3, 6, 8), "x": (2, 3, 6, 5)},
    "discrete_vae": {"z": (2, 3, 6, 8, 4), "x": (2, 3, 6, 5)},
    "joint_vae": {"z": (2, 3, 6, 6), "c": (2, 3, 6, 1, 10), "x": (2, 3, 6, 5)},
    "probabilistic_pca": {"z": (2, 3, 6, 2), "x": (2, 3, 6, 5)},
    "factor_analysis": {"z": (2, 3, 6, 2), "x": (2, 3, 6, 5)},
    "linear_gaussian_chain": {"z": (2, 3, 6, 4), "x": (2, 3, 6, 4)},
    "ar_hmm_partial": {"z": (2, 3, 6, 4), "x": (2, 3, 6, 4, 2), "known": (2, 3, 6, 4, 3)},
    "hmm": {"z": (2, 3, 6, 4), "x": (2, 3, 6, 4, 2)},
    "svae_slds": {"z": (2, 3, 6, 4, 2), "x": (2, 3, 6, 4, 3)},
    "latent_tree": {"z": (2, 3, 6, 6), "x": (2, 3, 6, 5)},
    "gp_factor_analysis": {"z": (2, 3, 6, 4, 4), "x": (2, 3, 6, 4, 3)},
    "functional_tucker": {"W": (2, 4), "z1": (2, 3, 4), "z2": (2, 4, 4), "y": (2, 3, 6)},
    "lds": {"z": (2, 3, 6, 4, 2), "x": (2, 3, 6, 4, 3)},
    "svae_lds": {"z": (2, 3, 6, 4, 2), "x": (2, 3, 6, 4, 3)},
    "deep_kalman_filter": {"z": (2, 3, 6, 4, 2), "x": (2, 3, 6, 4, 3)},
    "vrnn": {"z": (2, 3, 6, 4, 2), "x": (2, 3, 6, 4, 3)},
    "poglm": {"h": (2, 3, 6, 8, 2), "x": (2, 3, 6, 8, 3)},
    "bimodal_posterior": {"z": (2, 3, 6), "x": (2, 3, 6)},
    "gaussian_mixture": {"w": (2, 2), "mu": (2, 2, 2), "sigma": (2, 2, 2), "x": (2, 3, 6, 2)},
    "svae_gmm": {"pi": (2, 10), "theta": (2, 10, 3, 3), "c": (2, 3, 6), "z": (2, 3, 6, 2), "x": (2, 3, 6, 2)},
    "noisy_cone": {"x": (2, 3, 6), "y": (2, 3, 6), "z": (2, 3, 6)},
    "eight_schools": {"u": (2, 3, 1, 10), "mu": (2, 3, 1), "tau": (2, 3, 1), "eta": (2, 3, 1, 8), "y": (2, 3, 1, 8)},
}
"""Of every site's table, at two outer draws of three draws."""
SCORED = ("ar_hmm_partial", "discrete_vae", "hmm", "joint_vae", "latent_tree", "poglm", "svae_gmm")
ESTIMATORS = dict.fromkeys(SCORED, "score")
LONG = {"functional_tucker", "svae_gmm", "svae_slds"}
"""Programs whose gradients take XLA the better part of a minute."""


class Fitted:
    """A shipped program bound to data; every number comes back as a NumPy array."""

    def __init__(self, name: str, backend: str, data: np.ndarray | Arrays, **options: Any) -> None:
        self.jax = backend == "numpyro"
        self.estimator: Any = resolve("estimator", ESTIMATORS.get(name, "pathwise"), Path(), "the test")()
        kind: Callable[..., Any] = NumPyroBound if self.jax else PyroBound
        self.bound = kind(program(name, **options), Call.of(data), seed=0, dtype="float64")
        self.batch = self.bound.batch(Call.of(data))
        self.params = dict(self.bound.initial)

    def plan(self, objective: Objective) -> Plan:
        return legality.plan(objective, {"*": self.estimator}, self.bound.structure)[0]

    def run(self, f: Callable[[Any, Any], dict[str, Any]]) -> Arrays:
        quick = {"xla_backend_optimization_level": 0}
        found = jax.jit(f, compiler_options=quick)(self.params, jax.random.key(3)) if self.jax else f(self.params, 3)
        return {k: np.asarray(v.detach() if isinstance(v, torch.Tensor) else v) for k, v in found.items()}

    def table(self, M: int, K: int, values: Arrays | None = None) -> Arrays:
        plan = self.plan(elbo(draws=K, outer=M))

        given = {n: jnp.asarray(v) if self.jax else torch.as_tensor(v) for n, v in (values or {}).items()}

        def table(params: Any, key: Any) -> dict[str, Any]:
            draws = self.bound.draws(params, self.batch, key, plan, values=given)
            sites = {name: site.value for name, site in draws.sites.items()}
            log_p = {f"log_p({n})": s.log_p for n, s in draws.sites.items() if s.log_p is not None}
            return sites | log_p | {"log_w": draws.log_w}

        return self.run(table)

    def gradients(self) -> Arrays:
        objective = elbo(draws=2)
        plan = self.plan(objective)
        return self.run(lambda params, key: self.bound.gradients(params, self.batch, key, plan, objective).params)

    def set(self, values: Arrays) -> None:
        assert self.params.keys() == values.keys()
        for name, value in values.items():
            transform = self.bound._transforms[name]
            as_array: Any = jnp.asarray if self.jax else torch.as_tensor
            self.params[name] = (transform._inverse if self.jax else transform.inv)(as_array(value))


def example(name: str) -> Any:
    make = program(name).example
    assert make is not None
    return make(np.random.default_rng(0))


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        pytest.param(n, b, marks=[pytest.mark.slow] if n in LONG and b == "numpyro" else [])
        for n in programs()
        for b in BACKENDS
    ],
)
def test_tables_have_draws_rows_and_events_and_every_parameter_gets_a_gradient(
    name: str, backend: str
) -> None:
    with precision("float64"):
        fitted = Fitted(name, backend, example(name))
        table, gradients = fitted.table(M=2, K=3), fitted.gradients()
    for site, shape in SHAPES[name].items():
        # Data that every draw shares may stand there once.
        assert np.broadcast_shapes(table[site].shape, shape) == shape, site
        rows = 2 if fitted.bound.structure.sites[site].local else 0
        if site != "u":  # the guide's own
            assert table[f"log_p({site})"].shape == shape[: 1 + rows], site
    assert np.isfinite(table["log_w"]).all()
    assert gradients.keys() == fitted.params.keys()
    assert all(g.any() and np.isfinite(g).all() for g in gradients.values())


@pytest.mark.parametrize(("name", "backend"), [("vae", "pyro"), ("vae", "numpyro"), ("discrete_vae", "pyro")])
def test_bernoulli_is_the_binomial_of_one_trial(name: str, backend: str) -> None:
    x = np.random.default_rng(0).integers(0, 2, size=(6, 5)).astype(float)
    with precision("float64"):
        bernoulli = Fitted(name, backend, x, likelihood="bernoulli").table(1, 2)
        binomial = Fitted(name, backend, x, total_count=1).table(1, 2)
    np.testing.assert_allclose(bernoulli["log_w"], binomial["log_w"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_probabilistic_pca_holds_its_exact_posterior(backend: str) -> None:
    rng = np.random.default_rng(1)
    W, mu, sigma = rng.normal(size=(5, 2)), rng.normal(size=5), 0.7
    P = np.linalg.inv(W.T @ W + sigma**2 * np.eye(2))
    A, L = P @ W.T, np.linalg.cholesky(sigma**2 * P)
    x = example("probabilistic_pca")
    with precision("float64"):
        fitted = Fitted("probabilistic_pca", backend, x)
        exact = {"encoder.weight": A, "encoder.bias": -A @ mu, "L": L}
        fitted.set({"W": W, "mu": mu, "sigma": np.asarray(sigma), **exact})
        log_w = fitted.table(1, 4)["log_w"]
    evidence = multivariate_normal(mu, W @ W.T + sigma**2 * np.eye(5)).logpdf(x.astype(float))
    np.testing.assert_allclose(log_w[0], np.broadcast_to(evidence, (4, 6)), rtol=0, atol=1e-10)


def gaussian_chain(a: float, c: float, q: float, r: float, T: int) -> tuple[np.ndarray, np.ndarray]:
    """Covariances of (z, x) [2 T, 2 T] of the chain, from z = F e with independent e."""
    F = np.array([[a ** (t - s) * (q if s else 1.0) if t >= s else 0.0 for s in range(T)] for t in range(T)])
    joint = np.block([[F, np.zeros((T, T))], [c * F, r * np.eye(T)]])
    S = joint @ joint.T
    return S, S[T:, T:]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_chain_holds_its_exact_posterior(backend: str) -> None:
    """With the guide at the smoothing distribution every draw's weight is the log likelihood."""
    a, c, q, r, T = 0.8, 1.3, 0.6, 0.5, 4
    S, of_x = gaussian_chain(a, c, q, r, T)
    A, B, s = np.zeros(T), np.zeros((T, T)), np.zeros(T)
    for t in range(T):
        # z_t given z_{t-1} and x_t .. x_T, by regression.
        on = [*([t - 1] if t else []), *range(T + t, 2 * T)]
        weights = np.linalg.solve(S[np.ix_(on, on)], S[on, t])
        s[t] = np.sqrt(S[t, t] - weights @ S[on, t])
        A[t], B[t, t:] = (weights[0], weights[1:]) if t else (0.0, weights)
    x = example("linear_gaussian_chain").astype(float)
    with precision("float64"):
        fitted = Fitted("linear_gaussian_chain", backend, x)
        scalars = {n: np.asarray(v) for n, v in {"a": a, "c": c, "q": q, "r": r}.items()}
        fitted.set({**scalars, "A": A, "B": B, "b": np.zeros(T), "s": s})
        log_w = fitted.table(1, 4)["log_w"]
    evidence = multivariate_normal(np.zeros(T), of_x).logpdf(x)
    np.testing.assert_allclose(log_w[0], np.broadcast_to(evidence, (4, 6)), rtol=0, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_densities_of_the_mixture(backend: str) -> None:
    """log p(x) of every row and draw, the assignments summed out by hand."""
    x = example("gaussian_mixture").astype(float)
    with precision("float64"):
        table = Fitted("gaussian_mixture", backend, x).table(2, 1)
    for m in range(2):
        w, mu, sigma = (table[n][m] for n in ("w", "mu", "sigma"))
        parts = [np.log(w[k]) + norm.logpdf(x, mu[k], sigma[k]).sum(-1) for k in range(2)]
        np.testing.assert_allclose(table["log_p(x)"][m, 0], np.logaddexp(*parts), rtol=0, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_eight_schools_draw_tau_by_a_softplus(backend: str) -> None:
    """Its density is that of a change of variables, from both tails; u itself is a standard normal here."""
    u = np.random.default_rng(3).normal(size=(1, 6, 1, 10))
    u[0, :, 0, 1] = [-30.0, -4.0, 0.0, 2.0, 9.0, 60.0]
    with precision("float64"):
        fitted = Fitted("eight_schools", backend, {n: v.astype(float) for n, v in example("eight_schools").items()})
        fitted.set({"loc": np.zeros(10), "L": np.eye(10)})
        table = fitted.table(1, 6, {"u": u})
    v = u[0, :, 0, 1]
    tau = 5 * np.log1p(np.exp(v))
    np.testing.assert_allclose(table["tau"][0, :, 0], tau, rtol=1e-12)
    log_q = norm.logpdf(u).sum(-1)[0, :, 0] - np.log(5) - v + np.log1p(np.exp(v))
    log_p = np.sum([table[f"log_p({n})"] for n in ("mu", "tau", "eta", "y")], axis=0)
    np.testing.assert_allclose((log_p - table["log_w"])[0, :, 0], log_q, rtol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_densities_of_the_bimodal_posterior(backend: str) -> None:
    """log p and log q by hand, at parameters other than the initial ones."""
    x, pi = example("bimodal_posterior").astype(float), 0.3
    mu, c, sigma = np.array([-4.0, -1.0, 0.5, 3.0]), np.array([-2.0, 1.0]), np.array([0.7, 1.5])
    with precision("float64"):
        fitted = Fitted("bimodal_posterior", backend, x)
        fitted.set({"pi": np.asarray(pi), "mu": mu, "c": c, "sigma": sigma})
        table = fitted.table(1, 4)
    z, side = table["z"], x.astype(int)
    weights = np.array([1 - pi, 1 - pi, pi, pi]) / 2
    log_p_z = logsumexp(norm.logpdf(z[..., None], mu), b=weights, axis=-1)
    log_p_x = log_expit(np.where(x > 0.5, z, -z))
    np.testing.assert_allclose(table["log_p(z)"], log_p_z, rtol=0, atol=1e-10)
    np.testing.assert_allclose(table["log_p(x)"], log_p_x, rtol=0, atol=1e-10)
    log_w = log_p_z + log_p_x - norm.logpdf(z, c[side], sigma[side])
    np.testing.assert_allclose(table["log_w"], log_w, rtol=0, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_densities_of_partly_seen_neurons(backend: str) -> None:
    """log p and log q of whole sequences by a loop over bins, more of them than the window."""
    rng, x = np.random.default_rng(4), example("poglm").astype(float)
    W, b, V, a = (0.2 * rng.normal(size=shape) for shape in ((5, 5), (5,), (2, 5), (2,)))
    kernel = np.exp(-2.0 * 0.1 * np.arange(3))
    kernel /= 0.1 * kernel.sum()
    with precision("float64"):
        fitted = Fitted("poglm", backend, x, window=3, decay=2.0, dt=0.1)
        fitted.set({"W": W, "b": b, "V": V, "a": a})
        table = fitted.table(1, 4)
    h = table["h"][0].astype(float)  # [K, B, T, hidden]
    y = np.concatenate([np.broadcast_to(x, (*h.shape[:-1], 3)), h], axis=-1)
    log_p_h, log_p_x, log_q = (np.zeros(h.shape[:2]) for _ in range(3))
    for t in range(h.shape[2]):
        s = sum((kernel[lag] * y[:, :, t - 1 - lag] for lag in range(min(3, t))), np.zeros(y[:, :, 0].shape))
        spikes = poisson.logpmf(y[:, :, t], expit(s @ W.T + b))
        log_p_x, log_p_h = log_p_x + spikes[..., :3].sum(-1), log_p_h + spikes[..., 3:].sum(-1)
        log_q = log_q + poisson.logpmf(h[:, :, t], expit(s @ V.T + a)).sum(-1)
    np.testing.assert_allclose(table["log_p(h)"][0], log_p_h, rtol=0, atol=1e-10)
    np.testing.assert_allclose(table["log_p(x)"][0], log_p_x, rtol=0, atol=1e-10)
    np.testing.assert_allclose(table["log_w"][0], log_p_h + log_p_x - log_q, rtol=0, atol=1e-10)


EXAMPLES = [name for name in programs() if program(name).example is not None]
ON_NUMPYRO = [pytest.param(name, "numpyro", marks=pytest.mark.slow) for name in EXAMPLES]


@pytest.mark.parametrize(("name", "backend"), [*((name, "pyro") for name in EXAMPLES), *ON_NUMPYRO])
def test_its_example_is_fitted_as_it_comes(name: str, backend: str) -> None:
    """By its own recipe, in single precision, which nothing else here is in."""
    example = program(name).example
    assert example is not None
    data = example(np.random.default_rng(0))
    run = fit(name, data=data, backend=backend, steps=2, batch_size=None, compile="auto", progress_bar=False)
    assert np.isfinite(run.history["loss"]).all()
    assert {str(v.dtype) for v in run.params.values() if v.dtype.kind == "f"} == {"float32"}
