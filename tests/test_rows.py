"""Parameters with an entry for every row: trained in mini-batches, refitted on other rows, exact where known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro
import pyro
import pytest
import torch
from harness import BACKENDS
from toys import Array, Backend, Ppl

from ppl_lvm import Fit, fit, refit
from ppl_lvm.errors import DataError, ProgramError
from ppl_lvm.program import Program

on_both = pytest.mark.parametrize("backend", BACKENDS)
X = np.random.default_rng(0).normal(size=6)
NEW = np.random.default_rng(1).normal(size=4)
SETTLED: dict[str, Any] = {
    "recipe": "elbo",
    "estimator": "dreg",
    "batch_size": 2,
    "steps": 900,
    "learning_rate": {"schedule": "exponential", "start": 0.1, "end": 1e-4, "steps": 900},
    "dtype": "float64",
}
"""The gradient of `dreg` has no noise at the exact posterior, so a decaying rate ends there."""


def model(ppl: Ppl, x: Array) -> None:
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", ppl.dist.Normal(0.0 * x, 1.0))
        ppl.sample("x", ppl.dist.Normal(z, 1.0), obs=x)


def guide(ppl: Ppl, x: Array) -> None:
    with ppl.plate("data", len(x)):
        loc, log_scale = ppl.row_param("loc", 0.3), ppl.row_param("log_scale", 0.1)
        ppl.sample("z", ppl.dist.Normal(loc, ppl.xp.exp(log_scale)))


def native(backend: Backend) -> tuple[Callable[..., None], Callable[..., None]]:
    """The same program in each library's own words: the guide asks for the indices of its rows."""

    def pyro_model(x: Any) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pyro.distributions.Normal(0.0 * x, 1.0))
            pyro.sample("x", pyro.distributions.Normal(z, 1.0), obs=x)

    def pyro_guide(x: Any, rows: Any) -> None:
        loc, log_scale = (pyro.param(n, torch.full((6,), v)) for n, v in (("loc", 0.3), ("log_scale", 0.1)))
        with pyro.plate("data", len(x)):
            pyro.sample("z", pyro.distributions.Normal(loc[rows], log_scale[rows].exp()))

    def numpyro_model(x: Any) -> None:
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", numpyro.distributions.Normal(0.0 * x, 1.0))
            numpyro.sample("x", numpyro.distributions.Normal(z, 1.0), obs=x)

    def numpyro_guide(x: Any, rows: Any) -> None:
        loc, log_scale = (numpyro.param(n, jnp.full(6, v)) for n, v in (("loc", 0.3), ("log_scale", 0.1)))
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", numpyro.distributions.Normal(loc[rows], jnp.exp(log_scale[rows])))

    return (pyro_model, pyro_guide) if backend == "pyro" else (numpyro_model, numpyro_guide)


def portable() -> Program:
    return Program("rows", model, guide, portable=True, arguments=("x",))


def assert_exact(run: Fit, x: np.ndarray) -> None:
    np.testing.assert_allclose(run.params["loc"], x / 2, atol=2e-3)
    np.testing.assert_allclose(run.params["log_scale"], 0.5 * np.log(0.5), atol=2e-3)


@on_both
def test_mini_batches_train_every_rows_own_posterior(backend: Backend) -> None:
    assert_exact(fit(portable(), data=X, backend=backend, **SETTLED), X)


@on_both
def test_a_native_guide_is_given_the_rows_of_its_batch(backend: Backend) -> None:
    model, guide = native(backend)
    options = {**SETTLED, "steps": 3}
    runs = [fit(model, guide, X, backend=backend, **options), fit(portable(), data=X, backend=backend, **options)]
    for name in ("loc", "log_scale"):
        np.testing.assert_allclose(runs[0].params[name], runs[1].params[name], atol=1e-12)


@on_both
def test_rows_outside_the_batch_stay(backend: Backend) -> None:
    first = fit(portable(), data=X, backend=backend, **SETTLED | {"steps": 1})
    assert (first.params["loc"] != 0.3).sum() == 2


@on_both
def test_other_rows_are_refitted_with_the_rest_frozen(backend: Backend) -> None:
    def scaled(ppl: Ppl, x: Array) -> None:
        shift = ppl.param("shift", 0.0)
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", ppl.dist.Normal(0.0 * x, 1.0))
            ppl.sample("x", ppl.dist.Normal(z + shift, 1.0), obs=x)

    program = Program("shifted", scaled, guide, portable=True, arguments=("x",))
    run = fit(program, data=X, backend=backend, **SETTLED | {"steps": 20})
    with pytest.raises(DataError, match=r"\['loc', 'log_scale'\] have an entry for every row.*refit\(run, data\)"):
        run.log_likelihood(NEW)
    again = refit(run, NEW, steps=SETTLED["steps"], learning_rate=SETTLED["learning_rate"])
    assert again.params["shift"] == run.params["shift"]
    assert_exact(again, NEW - run.params["shift"])
    assert again.log_likelihood(draws=3).values.shape == (4,)


def test_what_cannot_be_refitted_is_said() -> None:
    run = fit("probabilistic_pca", data=np.random.default_rng(0).normal(size=(8, 3)), steps=1)
    with pytest.raises(ProgramError, match="has no parameters of rows"):
        refit(run, np.zeros((2, 3)))
    with pytest.raises(DataError, match="rows that are held out have none"):
        fit(portable(), data=X, validation=0.5, steps=1)
