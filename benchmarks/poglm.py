"""Hidden neurons of a partially observed GLM, Poisson counts that only scores can train: VIS against VI, CHIVI, VBIS.

    python benchmarks/poglm.py --trials 0 1 2 3 4 5 6 7 8 9 --draws 200

Program `poglm` on 40 sequences of 100 bins from 5 neurons, 2 of them hidden, as in Li, Wang, Li and Wu (2024),
arXiv:2311.02516, section 4.3: batches of 10, 20 epochs, Adam at 1e-2, parameters from zero, score estimators without
baselines. Every trial has data of its own, the same for all methods, which also share noise and the order of rows.
On 20 other sequences, mean log p(x) in nats from 1,000 draws,

    LL     of the fitted guide
    prior  of the model's own hidden neurons, run forward: a proposal that no method has trained
"""

import argparse
from typing import Any

import numpy as np

from ppl_lvm import fit, program
from ppl_lvm.datasets import Dataset
from ppl_lvm.posterior import Fit

METHODS = {"VI": "elbo", "CHIVI": "chivi", "VBIS": "vbis", "VIS": "vis"}
VISIBLE, HIDDEN, BINS, TRAIN, TEST = 3, 2, 100, 40, 20
BATCH, EPOCHS, EVALUATED = 10, 20, 1000
WINDOW, DECAY, DT = 5, 5.0, 0.05


def data(trial: int = 0) -> Dataset:
    """Spike counts of the visible neurons, with those of the hidden ones and the true parameters."""
    rng, neurons, rows = np.random.default_rng(trial), VISIBLE + HIDDEN, TRAIN + TEST
    W, b = 0.1 * rng.normal(size=(neurons, neurons)), rng.uniform(-1.0, 1.0, size=neurons) / 5**0.5
    kernel = np.exp(-DECAY * DT * np.arange(1, WINDOW + 1))
    kernel /= DT * kernel.sum()
    y = np.zeros((rows, WINDOW + BINS, neurons))
    for t in range(WINDOW, WINDOW + BINS):
        past = np.einsum("l,rln->rn", kernel, y[:, t - WINDOW : t][:, ::-1])
        y[:, t] = rng.poisson(1.0 / (1.0 + np.exp(-(past @ W.T + b))))
    x, h = y[:, WINDOW:, :VISIBLE], y[:, WINDOW:, VISIBLE:]
    return Dataset(
        name="poglm",
        train=x[:TRAIN],
        test=x[TRAIN:],
        train_labels=None,
        test_labels=None,
        image_shape=None,
        description="Poisson counts of 5 neurons that see one another's last 5 bins, 3 of them visible.",
        licence="CC0-1.0 (generated)",
        train_factors={"h": h[:TRAIN]},
        test_factors={"h": h[TRAIN:]},
        parameters={"W": W, "b": b},
    )


def trained(of: Dataset, recipe: str, **options: Any) -> Fit:
    """A fit of the experiment's size."""
    size = {"batch_size": BATCH, "steps": EPOCHS * TRAIN // BATCH, "learning_rate": 1e-2}
    neurons = program("poglm", hidden=HIDDEN, window=WINDOW, decay=DECAY, dt=DT)
    return fit(neurons, data=of.train, recipe=recipe, estimator="score", progress_bar=False, **{**size, **options})


def run(method: str, trial: int, seed: int, draws: int, backend: str = "pyro") -> dict[str, float]:
    """Log likelihoods of one fit, and its seconds."""
    of = data(trial)
    # Traced once and replayed: hundreds of sites a step are slow to go through handlers, and to compile.
    mode = "graph" if backend == "pyro" else "auto"
    fitted = trained(of, METHODS[method], draws=draws, seed=seed, backend=backend, compile=mode)
    W, b = fitted.params["W"], fitted.params["b"]
    forward = {"W": W, "b": b, "V": W[VISIBLE:], "a": b[VISIBLE:]}
    still = {"draws": 1, "steps": 1, "learning_rate": 0.0, "compile": "eager"}
    prior = trained(of, "elbo", start=forward, seed=seed, backend=backend, **still)
    return {
        "LL": fitted.log_likelihood(of.test, draws=EVALUATED).mean,
        "prior": prior.log_likelihood(of.test, draws=EVALUATED).mean,
        "seconds": fitted.seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--trials", nargs="+", type=int, default=[*range(10)])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--backend", choices=["pyro", "numpyro"], default="pyro")
    asked = parser.parse_args()
    columns = ("LL", "prior", "seconds")
    found: dict[str, list[dict[str, float]]] = {method: [] for method in asked.methods}
    print("| trial | seed | method | " + " | ".join(columns) + " |\n" + "|---" * 6 + "|")
    for trial in asked.trials:
        for seed in asked.seeds:
            for method in asked.methods:
                scores = run(method, trial, seed, asked.draws, asked.backend)
                found[method].append(scores)
                numbers = " | ".join(f"{scores[c]:.3f}" for c in columns)
                print(f"| {trial} | {seed} | {method} | {numbers} |", flush=True)
    print("\n| | LL | prior |\n|---|---|---|")
    every = {m: {c: np.array([s[c] for s in runs]) for c in ("LL", "prior")} for m, runs in found.items()}
    for method, of in every.items():
        print(f"| {method} | " + " | ".join(f"{v.mean():.3f}" for v in of.values()) + " |")
    last = asked.methods[-1]
    for method in asked.methods[:-1]:
        cells = []
        for column in ("LL", "prior"):
            gain = every[last][column] - every[method][column]
            error = gain.std(ddof=1) / len(gain) ** 0.5 if len(gain) > 1 else np.nan
            cells.append(f"{gain.mean():+.3f} ({error:.3f}), {(gain > 0).sum()} of {len(gain)}")
        print(f"| {last} - {method} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
