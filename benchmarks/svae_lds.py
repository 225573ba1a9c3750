"""How tight a structured VAE's bound is on a linear dynamical system: its ELBO against the exact log likelihood.

    python benchmarks/svae_lds.py

Program `svae_lds` with a linear decoder and linear potentials, whose precision all steps share, on 100 and on 10
training sequences of `lds_medium` (3 states, 5 numbers, 100 steps, noise as large as the signal), and the same with a
Gauss-Markov and a mean field guide, whose networks read the whole sequence. Of the 60 test sequences, in nats a number:

    ELBO          of 20 draws
    exact         the log likelihood of the learned system, by its Kalman filter
    gap           the two's difference: what the guide's family costs
    truth         the log likelihood of the system that made the data
    best          that of the system most likely on the training sequences, by L-BFGS from the truth: where training of
                  an exact bound ends

Zhao and Linderman (2023), Revisiting Structured Variational Autoencoders, arXiv:2305.16543, section 5.1.
"""

from __future__ import annotations

import argparse
import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from scipy.optimize import minimize

from ppl_lvm import Fit, fit, ops, program
from ppl_lvm.backends.numpyro import precision
from ppl_lvm.datasets import Dataset, load
from ppl_lvm.structured.gaussian_chain import GaussianChain, observed

GUIDES = ("structured", "gauss_markov", "mean_field")
NETWORKS = ("forwards", "backwards", "recognition")
RATE, RECURRENT = 3e-2, 1e-2
"""Of all parameters, and of networks that read whole sequences, whose gaps are larger at the rate of all."""


@dataclass(frozen=True)
class Tightness:
    """Nats a number, on test sequences."""

    elbo: float
    exact: float
    truth: float

    @property
    def gap(self) -> float:
        return self.exact - self.elbo


def log_likelihood(x: Any, p: Mapping[str, Any]) -> Any:
    """`log p(x)` a number, with A, b, Q, C, d, R (the variances), mean and cov of a linear dynamical system."""
    xp = ops.xp(x)
    J, h, c = observed(xp.moveaxis(x, 1, 0), p["C"], p["d"], p["R"])
    bias = xp.broadcast_to(p["b"], (x.shape[1] - 1, *p["b"].shape))
    chain = GaussianChain(p["mean"], p["cov"], p["A"][None], bias, p["Q"][None], J, h)
    return xp.sum(chain.log_normalizer() + xp.sum(c, axis=0)) / math.prod(x.shape)


def exact(x: np.ndarray, p: Mapping[str, np.ndarray], backend: str) -> float:
    as_array: Any = importlib.import_module("torch" if backend == "pyro" else "jax.numpy").asarray
    with precision("float64"):
        arrays = {n: as_array(np.asarray(v, dtype=float)) for n, v in p.items()}
        return float(log_likelihood(as_array(x.astype(float)), arrays))


def true(data: Dataset) -> dict[str, np.ndarray]:
    assert data.parameters is not None
    return {**data.parameters, "b": np.zeros(3), "R": np.diag(data.parameters["R"])}


def best(rows: int, seed: int) -> float:
    """The test sequences' log likelihood under the system most likely on the training sequences."""
    data = load("lds_medium", seed)

    def system(free: Mapping[str, Any]) -> dict[str, Any]:
        Q, R = jnp.diag(jnp.exp(free["Q"])), jnp.exp(free["R"])
        return {**free, "Q": Q, "R": R, "cov": jnp.eye(3)}

    with precision("float64"):
        of = {n: jnp.asarray(v, dtype=float) for n, v in true(data).items()}
        free = {n: of[n] for n in ("A", "b", "C", "d", "mean")}
        flat, unflat = ravel_pytree(free | {"Q": jnp.log(jnp.diag(of["Q"])), "R": jnp.log(of["R"])})
        train = jnp.asarray(data.train[:rows], dtype=float)
        loss = jax.jit(jax.value_and_grad(lambda v: -log_likelihood(train, system(unflat(v)))))
        found = minimize(
            lambda v: tuple(np.asarray(a, dtype=float) for a in loss(v)),
            np.asarray(flat),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": 5000},
        )
        assert found.success, found.message
        return float(log_likelihood(jnp.asarray(data.test, dtype=float), system(unflat(jnp.asarray(found.x)))))


def learned(run: Fit) -> dict[str, np.ndarray]:
    p = run.params
    C, d = p["decoder.layers.0.weight"], p["decoder.layers.0.bias"]
    system = {"A": p["A"], "b": p["b"], "Q": np.diag(p["q"]), "C": C, "d": d, "R": p["scale"] ** 2}
    return system | {"mean": p["m"], "cov": np.eye(len(p["m"]))}


def tightness(posterior: str, rows: int, steps: int, backend: str, seed: int, length: int = 100) -> Tightness:
    """Of one fit on `rows` sequences of `length` steps."""
    data = load("lds_medium", seed)
    train, test = data.train[:rows, :length], data.test[:, :length]

    def adam(rate: float) -> dict[str, Any]:
        falling = {"schedule": "exponential", "start": rate, "end": 1e-3, "steps": steps}
        return {"name": "adam", "learning_rate": falling}

    recurrent = NETWORKS if posterior != "structured" else ()
    run = fit(
        program("svae_lds", latent=3, hidden=(), potential="natural", precision="shared", posterior=posterior),
        data=train,
        recipe="elbo",
        steps=steps,
        batch_size=10,
        optimizer={f"{network}.*": adam(RECURRENT) for network in recurrent} | {"*": adam(RATE)},
        backend=backend,
        dtype="float64",
        seed=seed,
        progress_bar=False,
    )
    drawn = run.posterior(20, test)
    return Tightness(
        elbo=float((drawn.log_p - drawn.log_q).mean() / test[0].size),
        exact=exact(test, learned(run), backend),
        truth=exact(test, true(data), backend),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guides", nargs="+", default=[*GUIDES], choices=GUIDES)
    parser.add_argument("--rows", nargs="+", type=int, default=[100, 10], help="training sequences")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--backend", default="numpyro", choices=["pyro", "numpyro"])
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    print("| guide | training sequences | ELBO | exact | gap | truth | best |\n|---|---|---|---|---|---|---|")
    for rows in asked.rows:
        most = best(rows, asked.seed)
        for guide in asked.guides:
            found = tightness(guide, rows, asked.steps, asked.backend, asked.seed)
            numbers = (found.elbo, found.exact, found.gap, found.truth, most)
            print(f"| {guide} | {rows} | " + " | ".join(f"{v:.4f}" for v in numbers) + " |", flush=True)


if __name__ == "__main__":
    main()
