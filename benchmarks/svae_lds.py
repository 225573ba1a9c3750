"""How tight a structured VAE's bound is on a linear dynamical system: its ELBO against the exact log likelihood.

    python benchmarks/svae_lds.py

Program `svae_lds` with a linear decoder and linear potentials on 100 and on 10 training sequences of `lds_medium` (3
states, 5 numbers, 100 steps, noise as large as the signal), and the same with a mean field guide that reads the whole
sequence. Of the 60 test sequences, in nats a number:

    ELBO          of 20 draws
    exact         the log likelihood of the learned system, by its Kalman filter
    gap           the two's difference: what the guide's family costs
    truth         the log likelihood of the system that made the data

Zhao and Linderman (2023), Revisiting Structured Variational Autoencoders, arXiv:2305.16543, section 5.1.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ppl_lvm import Fit, fit, program
from ppl_lvm.datasets import load
from ppl_lvm.structured.gaussian_chain import GaussianChain, observed

GUIDES = ("structured", "mean_field")


@dataclass(frozen=True)
class Tightness:
    """Nats a number, on test sequences."""

    elbo: float
    exact: float
    truth: float

    @property
    def gap(self) -> float:
        return self.exact - self.elbo


def log_likelihood(x: np.ndarray, p: Mapping[str, np.ndarray], backend: str) -> float:
    """`log p(x)` a number, with A, b, Q, C, d, R (the variances), mean and cov of a linear dynamical system."""
    as_array: Any = importlib.import_module("torch" if backend == "pyro" else "jax.numpy").asarray
    a = {n: as_array(np.asarray(v)) for n, v in p.items()}
    J, h, c = observed(as_array(np.moveaxis(x, 1, 0)), a["C"], a["d"], a["R"])
    steps = x.shape[1] - 1
    F, b, Q = (as_array(np.stack([np.asarray(p[n])] * steps)) for n in ("A", "b", "Q"))
    chain = GaussianChain(a["mean"], a["cov"], F, b, Q, J, h)
    return float(np.asarray(chain.log_normalizer() + c.sum(0)).sum() / x.size)


def learned(run: Fit) -> dict[str, np.ndarray]:
    p = run.params
    C, d = p["decoder.layers.0.weight"], p["decoder.layers.0.bias"]
    system = {"A": p["A"], "b": p["b"], "Q": np.diag(p["q"]), "C": C, "d": d, "R": p["scale"] ** 2}
    return system | {"mean": p["m"], "cov": np.eye(len(p["m"]))}


def tightness(posterior: str, rows: int, steps: int, backend: str, seed: int, length: int = 100) -> Tightness:
    """Of one fit on `rows` sequences of `length` steps."""
    data = load("lds_medium", seed)
    assert data.parameters is not None
    train, test = data.train[:rows, :length], data.test[:, :length]
    run = fit(
        program("svae_lds", latent=3, hidden=(), posterior=posterior),
        data=train,
        recipe="elbo",
        steps=steps,
        batch_size=10,
        learning_rate={"schedule": "exponential", "start": 3e-2, "end": 1e-3, "steps": steps},
        backend=backend,
        dtype="float64",
        seed=seed,
        progress_bar=False,
    )
    drawn = run.posterior(20, test)
    true = {**data.parameters, "b": np.zeros(3), "R": np.diag(data.parameters["R"])}
    return Tightness(
        elbo=float((drawn.log_p - drawn.log_q).mean() / test[0].size),
        exact=log_likelihood(test, learned(run), backend),
        truth=log_likelihood(test, true, backend),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guides", nargs="+", default=[*GUIDES], choices=GUIDES)
    parser.add_argument("--rows", nargs="+", type=int, default=[100, 10], help="training sequences")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--backend", default="numpyro", choices=["pyro", "numpyro"])
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    print("| guide | training sequences | ELBO | exact | gap | truth |\n|---|---|---|---|---|---|")
    for rows in asked.rows:
        for guide in asked.guides:
            found = tightness(guide, rows, asked.steps, asked.backend, asked.seed)
            numbers = (found.elbo, found.exact, found.gap, found.truth)
            print(f"| {guide} | {rows} | " + " | ".join(f"{v:.4f}" for v in numbers) + " |", flush=True)


if __name__ == "__main__":
    main()
