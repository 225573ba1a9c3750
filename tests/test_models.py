"""What the shipped programs reach: the optimum of probabilistic PCA; IWAE above ELBO on handwritten digits."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.decomposition import PCA

from ppl_lvm import fit, program
from ppl_lvm.datasets import load

on_both = pytest.mark.parametrize("backend", ["pyro", "numpyro"])


@on_both
def test_probabilistic_pca_reaches_its_optimum(backend: str) -> None:
    """Within 1e-3 nat a row of the maximum that scikit-learn computes in closed form."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 2)) @ rng.normal(size=(2, 6)) + rng.normal(scale=0.5, size=(300, 6)) + rng.normal(size=6)
    best = PCA(n_components=2, svd_solver="full").fit(x).score(x)
    run = fit(
        program("probabilistic_pca", latent=2),
        data=x,
        recipe="elbo",
        backend=backend,
        estimator="dreg",  # in a mean, sticking the landing: no noise is left at the optimum
        learning_rate={"schedule": "cosine", "start": 0.05, "end": 0.0, "steps": 3000},
        steps=3000,
        batch_size=None,
        dtype="float64",
    )
    reached = run.log_likelihood(x, draws=200)
    assert best - 1e-3 < reached.mean <= best + 1e-3
    assert best - 1e-3 < -run.history["loss"][-1] <= best + 1e-3


@pytest.mark.slow
@on_both
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_iwae_beats_elbo_on_digits(backend: str, seed: int) -> None:
    """Held-out log likelihood from 5,000 importance draws: the paired difference per row, above two standard errors."""
    digits = load("digits")
    held_out = {
        recipe: fit(
            program("vae", latent=8), data=digits.train, recipe=recipe, backend=backend, seed=seed, steps=1500
        )
        .log_likelihood(digits.test, draws=5000)
        .values
        for recipe in ("elbo", "iwae")
    }
    difference = held_out["iwae"] - held_out["elbo"]
    assert difference.mean() > 2 * difference.std(ddof=1) / len(difference) ** 0.5
