"""The programs in models/ on both backends: shapes, gradients, and what is known in closed form."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from ppl_lvm.backends.base import Call, Plan
from ppl_lvm.backends.numpyro import NumPyroBound, precision
from ppl_lvm.backends.pyro import PyroBound
from ppl_lvm.catalogue import resolve
from ppl_lvm.program import program, programs
from ppl_lvm.recipe import recipe

Arrays = dict[str, np.ndarray]
BACKENDS = ["pyro", "numpyro"]
EVENTS: dict[str, dict[str, tuple[int, ...]]] = {
    "vae": {"z": (8,), "x": (5,)},
    "discrete_vae": {"z": (8, 4), "x": (5,)},
    "probabilistic_pca": {"z": (2,), "x": (5,)},
}
ESTIMATORS = {"discrete_vae": "score"}


class Fitted:
    """A shipped program bound to data; every number comes back as a NumPy array."""

    def __init__(self, name: str, backend: str, data: np.ndarray, **options: Any) -> None:
        self.jax = backend == "numpyro"
        self.estimator = resolve("estimator", ESTIMATORS.get(name, "pathwise"), Path(), "the test")()
        kind: Callable[..., Any] = NumPyroBound if self.jax else PyroBound
        self.bound = kind(program(name, **options), Call.of(data), seed=0, dtype="float64")
        self.batch = self.bound.batch(Call.of(data))
        self.params = dict(self.bound.initial)

    def run(self, f: Callable[[Any, Any], dict[str, Any]]) -> Arrays:
        found = jax.jit(f)(self.params, jax.random.key(3)) if self.jax else f(self.params, 3)
        return {k: np.asarray(v.detach() if isinstance(v, torch.Tensor) else v) for k, v in found.items()}

    def table(self, M: int, K: int) -> Arrays:
        plan = Plan(K=K, M=M, estimators={"z": self.estimator})  # type: ignore[dict-item]

        def table(params: Any, key: Any) -> dict[str, Any]:
            draws = self.bound.draws(params, self.batch, key, plan)
            sites = {name: site.value for name, site in draws.sites.items()}
            return sites | {f"log_p({n})": s.log_p for n, s in draws.sites.items()} | {"log_w": draws.log_w}

        return self.run(table)

    def gradients(self) -> Arrays:
        plan = Plan(K=2, estimators={"z": self.estimator})  # type: ignore[dict-item]
        elbo = recipe("elbo", draws=2).objective
        return self.run(lambda params, key: self.bound.gradients(params, self.batch, key, plan, elbo).params)

    def set(self, values: Arrays) -> None:
        assert self.params.keys() == values.keys()
        for name, value in values.items():
            transform = self.bound._transforms[name]
            as_array: Any = jnp.asarray if self.jax else torch.as_tensor
            self.params[name] = (transform._inverse if self.jax else transform.inv)(as_array(value))


def example(name: str) -> np.ndarray:
    make = program(name).example
    assert make is not None
    return np.asarray(make(np.random.default_rng(0)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", programs())
def test_tables_have_draws_rows_and_events_and_every_parameter_gets_a_gradient(
    name: str, backend: str
) -> None:
    with precision("float64"):
        fitted = Fitted(name, backend, example(name))
        table, gradients = fitted.table(M=2, K=3), fitted.gradients()
    assert table["z"].shape == (2, 3, 6, *EVENTS[name]["z"])
    assert table["x"].shape[2:] == (6, *EVENTS[name]["x"])
    assert table["log_p(z)"].shape == table["log_p(x)"].shape == (2, 3, 6)
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
