"""A guide with one mode on posteriors with two: VIS against VI, CHIVI and VBIS.

    python benchmarks/vis_mixture.py --seeds 0 1 2 --draws 1000

Program `bimodal_posterior` on 1,000 bits from pi = 0.7 and mu = (-8, -2, 2, 8), from the initial values of Li, Wang, Li
and Wu (2024), arXiv:2311.02516, section 4.1: batches of 100, 200 epochs, Adam at 2e-3, score estimators. On 1,000
other pairs (z, x), as means over them in nats,

    LL    log p(x), by a sum over a grid of z        gap  best log p(x) of the training rows less the model's, on them
    CLL   log p(x, z)                                HLL  log q(z | x)

Runs of one seed share noise and the order of rows, so methods are paired by it.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.special import log_expit, logsumexp, xlogy
from scipy.stats import norm

from ppl_lvm import fit, program

METHODS = {"VI": "elbo", "CHIVI": "chivi", "VBIS": "vbis", "VIS": "vis"}
ROWS, BATCH, EPOCHS = 1000, 100, 200
GRID = np.linspace(-30.0, 30.0, 6001)


@dataclass(frozen=True)
class Pairs:
    """Latents `[rows]` and bits `[rows]`."""

    z: np.ndarray
    x: np.ndarray


def draw(rng: np.random.Generator, rows: int) -> Pairs:
    """Pairs from the model at the true parameters."""
    mode = rng.choice(4, size=rows, p=[0.15, 0.15, 0.35, 0.35])
    z = np.array([-8.0, -2.0, 2.0, 8.0])[mode] + rng.normal(size=rows)
    return Pairs(z, (rng.random(rows) < 1.0 / (1.0 + np.exp(-z))).astype(np.float64))


def log_joint(params: Mapping[str, np.ndarray], z: np.ndarray, x: np.ndarray) -> np.ndarray:
    """`log p(x, z)`, elementwise."""
    pi = np.float64(params["pi"])
    prior = logsumexp(norm.logpdf(z[..., None], params["mu"]), b=np.array([1 - pi, 1 - pi, pi, pi]) / 2, axis=-1)
    return np.asarray(prior + log_expit(np.where(x > 0.5, z, -z)))


def scores(params: Mapping[str, np.ndarray], train: Pairs, test: Pairs) -> dict[str, float]:
    """LL, CLL, HLL and gap of a fit."""
    step = GRID[1] - GRID[0]
    log_p = np.array([logsumexp(log_joint(params, GRID, np.full_like(GRID, bit))) + np.log(step) for bit in (0, 1)])
    ones, side = train.x.mean(), test.x.astype(int)
    best = xlogy(ones, ones) + xlogy(1 - ones, 1 - ones)
    return {
        "LL": float(log_p[side].mean()),
        "CLL": float(log_joint(params, test.z, test.x).mean()),
        "HLL": float(norm.logpdf(test.z, params["c"][side], params["sigma"][side]).mean()),
        "gap": float(best - ones * log_p[1] - (1 - ones) * log_p[0]),
    }


def run(method: str, seed: int, draws: int, train: Pairs, test: Pairs, backend: str = "numpyro") -> dict[str, float]:
    """Scores of one fit, and its seconds."""
    fitted = fit(
        program("bimodal_posterior"),
        data=train.x,
        recipe=METHODS[method],
        backend=backend,
        draws=draws,
        estimator="score",
        steps=EPOCHS * ROWS // BATCH,
        batch_size=BATCH,
        learning_rate=2e-3,
        seed=seed,
        progress_bar=False,
    )
    return {**scores(fitted.params, train, test), "seconds": fitted.seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--backend", choices=["pyro", "numpyro"], default="numpyro")
    asked = parser.parse_args()
    rng = np.random.default_rng(0)
    train, test = draw(rng, ROWS), draw(rng, ROWS)
    columns = ("LL", "CLL", "HLL", "gap", "seconds")
    print("| method | seed | " + " | ".join(columns) + " |\n" + "|---" * 7 + "|")
    for method in asked.methods:
        found = []
        for seed in asked.seeds:
            found.append(run(method, seed, asked.draws, train, test, asked.backend))
            print(f"| {method} | {seed} | " + " | ".join(f"{found[-1][c]:.4f}" for c in columns) + " |", flush=True)
        every = {c: np.array([f[c] for f in found]) for c in columns}
        error = {c: v.std(ddof=1) / len(v) ** 0.5 if len(v) > 1 else np.nan for c, v in every.items()}
        means = " | ".join(f"{v.mean():.4f} ({error[c]:.4f})" for c, v in every.items())
        print(f"| {method} | mean (s.e.) | {means} |", flush=True)


if __name__ == "__main__":
    main()
